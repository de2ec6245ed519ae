//! A figure as SVG: selectable text, marks that differ by shape, every series labelled in place. Colour
//! alone carries no information, and a text describes the figure.

use super::axis::Axis;
use super::marks::{class, dashes, escape, mark, n};
use super::placing::{Area, LINE, RADIUS, apart, beside, text_width};

/// Width of a mark and the gaps around it, in front of a label.
const BEFORE_LABEL: f64 = 20.0;
/// Marks on a line; more would hide it.
const MARKS_ON_A_LINE: usize = 6;

/// Size and margins, in units of the view box.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

/// Points of one checkpoint; `number` chooses mark, dashes and colour.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) number: usize,
    pub(super) label: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// A value to compare with.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) y: f64,
    pub(super) label: String,
}

/// Everything in a figure.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// Unique in the page.
    pub(super) id: String,
    /// Title for screen readers.
    pub(super) title: String,
    /// Description for screen readers.
    pub(super) description: String,
    /// Above the figure, where it is one of several.
    pub(super) heading: Option<String>,
    pub(super) frame: Frame,
    pub(super) x: Axis,
    pub(super) x_title: String,
    pub(super) y: Axis,
    pub(super) y_title: String,
    pub(super) rules: Vec<Rule>,
    pub(super) series: Vec<Series>,
}

/// The margin that labels at the right ends of lines need.
pub(super) fn label_margin(series: &[Series]) -> f64 {
    let widths = series.iter().map(|series| text_width(&series.label));
    widths.fold(0.0, f64::max) + BEFORE_LABEL
}

impl Plot {
    /// A scatter plot: each point is a mark with an adjacent label.
    pub(super) fn scatter(&self) -> String {
        let mut taken: Vec<Area> = Vec::new();
        let mut body = self.rules(&mut taken);
        for series in &self.series {
            for &(x, y) in &series.points {
                let (x, y) = (self.px(x), self.py(y));
                let r = RADIUS + 1.0;
                taken.push(Area::around(x, y, r));
                body += &group(series, &mark(series.number, x, y, RADIUS));
            }
        }
        for series in &self.series {
            for &(x, y) in &series.points {
                body += &self.beside(series, self.px(x), self.py(y), &mut taken);
            }
        }
        self.svg(&body)
    }

    /// A line plot: each series is a line with its label at the right end.
    pub(super) fn lines(&self) -> String {
        let mut body = self.rules(&mut Vec::new());
        for (index, series) in self.series.iter().enumerate() {
            body += &group(series, &self.line(series, index));
        }
        body += &self.ends();
        self.svg(&body)
    }

    fn px(&self, x: f64) -> f64 {
        let Frame {
            width, left, right, ..
        } = self.frame;
        left + self.x.place(x) * (width - left - right)
    }

    fn py(&self, y: f64) -> f64 {
        let Frame {
            height,
            top,
            bottom,
            ..
        } = self.frame;
        height - bottom - self.y.place(y) * (height - top - bottom)
    }

    fn right_edge(&self) -> f64 {
        self.frame.width - self.frame.right
    }

    fn svg(&self, body: &str) -> String {
        let Frame { width, height, .. } = self.frame;
        let id = escape(&self.id);
        format!(
            "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n\
             <title id=\"{id}-t\">{}</title>\n<desc id=\"{id}-d\">{}</desc>\n{}{body}</svg>",
            n(width),
            n(height),
            escape(&self.title),
            escape(&self.description),
            self.axes(),
        )
    }

    fn axes(&self) -> String {
        let Frame {
            width,
            height,
            left,
            top,
            bottom,
            ..
        } = self.frame;
        let (floor, end) = (height - bottom, self.right_edge());
        let mut out = String::from("<g class=\"axes\">\n");
        for &tick in &self.y.ticks {
            let y = self.py(tick);
            out += &format!(
                "<path class=\"grid\" d=\"M{} {}H{}\"/><text x=\"{}\" y=\"{}\" class=\"end\">{}</text>\n",
                n(left),
                n(y),
                n(end),
                n(left - 5.0),
                n(y + 3.5),
                self.y.label(tick)
            );
        }
        for &tick in &self.x.ticks {
            let x = self.px(tick);
            out += &format!(
                "<path class=\"tick\" d=\"M{} {}v4\"/><text x=\"{}\" y=\"{}\" class=\"middle\">{}</text>\n",
                n(x),
                n(floor),
                n(x),
                n(floor + 15.0),
                self.x.label(tick)
            );
        }
        out += &format!(
            "<path class=\"axis\" d=\"M{} {}H{}\"/>\n",
            n(left),
            n(floor),
            n(end)
        );
        if !self.x_title.is_empty() {
            out += &format!(
                "<text x=\"{}\" y=\"{}\" class=\"end\">{}</text>\n",
                n(end),
                n(height - 3.0),
                escape(&self.x_title)
            );
        }
        if let Some(heading) = &self.heading {
            out += &format!(
                "<text x=\"{}\" y=\"11\" class=\"heading\">{}</text>\n",
                n(left),
                escape(heading)
            );
        }
        if !self.y_title.is_empty() {
            // Clear of a long first word, whatever the width of the tick labels.
            let x = (left - 36.0).max(2.0).min(width);
            out += &format!(
                "<text x=\"{}\" y=\"{}\">{}</text>\n",
                n(x),
                n(top - 10.0),
                escape(&self.y_title)
            );
        }
        out + "</g>\n"
    }

    fn rules(&self, taken: &mut Vec<Area>) -> String {
        let mut out = String::new();
        for rule in &self.rules {
            let (y, end) = (self.py(rule.y), self.right_edge());
            taken.push(Area {
                left: self.frame.left,
                top: y - 1.0,
                right: end,
                bottom: y + 1.0,
            });
            out += &format!(
                "<path class=\"rule\" d=\"M{} {}H{}\"/>\n",
                n(self.frame.left),
                n(y),
                n(end)
            );
            if !rule.label.is_empty() {
                let below = y + 3.0 + LINE < self.frame.height - self.frame.bottom;
                let base = if below { y + LINE } else { y - 4.0 };
                taken.push(Area {
                    left: end - text_width(&rule.label),
                    top: base - LINE,
                    right: end,
                    bottom: base + 2.0,
                });
                out += &format!(
                    "<text class=\"rule-label end\" x=\"{}\" y=\"{}\">{}</text>\n",
                    n(end),
                    n(base),
                    escape(&rule.label)
                );
            }
        }
        out
    }

    fn line(&self, series: &Series, index: usize) -> String {
        let points: Vec<(f64, f64)> = (series.points.iter())
            .map(|&(x, y)| (self.px(x), self.py(y)))
            .collect();
        let path: Vec<String> = (points.iter())
            .map(|&(x, y)| format!("{} {}", n(x), n(y)))
            .collect();
        let mut out = format!(
            "<path class=\"line\" d=\"M{}\"{}/>",
            path.join("L"),
            dashes(series.number)
        );
        // Marks of different series at different points, so that equal lines show both.
        let every = points.len().div_ceil(MARKS_ON_A_LINE).max(1);
        for &(x, y) in points.iter().skip(index % every).step_by(every) {
            out += &mark(series.number, x, y, RADIUS - 0.6);
        }
        out
    }

    /// Labels at the right ends of lines, moved apart where they would touch.
    fn ends(&self) -> String {
        let Frame {
            height,
            top,
            bottom,
            right,
            ..
        } = self.frame;
        let mut ends: Vec<(&Series, f64, f64)> = (self.series.iter())
            .filter_map(|series| {
                let &(x, y) = series.points.last()?;
                Some((series, self.px(x), self.py(y)))
            })
            .collect();
        // Without room for them the marks have to do, which a key explains.
        if right < BEFORE_LABEL {
            return String::new();
        }
        ends.sort_by(|one, other| one.2.total_cmp(&other.2));
        let wanted: Vec<f64> = ends.iter().map(|end| end.2).collect();
        let places = apart(&wanted, LINE, top, height - bottom + LINE);
        let mut out = String::new();
        for ((series, x, y), place) in ends.into_iter().zip(places) {
            let at = self.right_edge() + BEFORE_LABEL - 7.0;
            let text = format!(
                "<path class=\"lead\" d=\"M{} {}L{} {}\"/>{}<text x=\"{}\" y=\"{}\">{}</text>",
                n(x),
                n(y),
                n(at),
                n(place),
                mark(series.number, at, place, RADIUS - 0.6),
                n(at + 6.0),
                n(place + 3.7),
                escape(&series.label)
            );
            out += &group(series, &text);
        }
        out
    }

    /// A label near a mark; further away with a line to its mark.
    fn beside(&self, series: &Series, x: f64, y: f64, taken: &mut Vec<Area>) -> String {
        let field = Area {
            left: self.frame.left,
            top: self.frame.top - LINE,
            right: self.frame.width,
            bottom: self.frame.height - self.frame.bottom,
        };
        let found = beside(x, y, text_width(&series.label), &field, taken);
        taken.push(found.area);
        let middle = found.area.middle();
        let lead = match found.is_far {
            true => format!(
                "<path class=\"lead\" d=\"M{} {}L{} {}\"/>",
                n(x),
                n(y),
                n(x.clamp(found.area.left, found.area.right)),
                n(middle)
            ),
            false => String::new(),
        };
        let text = format!(
            "{lead}<text x=\"{}\" y=\"{}\">{}</text>",
            n(found.area.left),
            n(middle + 3.7),
            escape(&series.label)
        );
        group(series, &text)
    }
}

fn group(series: &Series, inner: &str) -> String {
    format!("<g class=\"{}\">{inner}</g>\n", class(series.number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(points: Vec<(f64, f64)>) -> Plot {
        Plot {
            id: "p".into(),
            title: "<title>".into(),
            description: "what & why".into(),
            heading: None,
            frame: Frame {
                width: 360.0,
                height: 240.0,
                left: 40.0,
                right: 20.0,
                top: 30.0,
                bottom: 10.0,
            },
            x: Axis::around(0.0, 10.0, 5),
            x_title: "x".into(),
            y: Axis::around(0.0, 4.0, 4),
            y_title: "y".into(),
            rules: vec![Rule {
                y: 1.0,
                label: "one".into(),
            }],
            series: vec![Series {
                number: 0,
                label: "a<b".into(),
                points,
            }],
        }
    }

    /// 300 units stand for 10 in x, 200 for 4 in y, upwards.
    #[test]
    fn points_are_where_their_values_are() {
        let svg = plot(vec![(2.5, 3.0)]).scatter();
        // 40 + 300 * 0.25 and 230 - 200 * 0.75.
        assert!(svg.contains(r#"cx="115" cy="80" r="3.6""#), "{svg}");
        // The rule at 1: 230 - 200 * 0.25.
        assert!(svg.contains(r#"class="rule" d="M40 180H340""#), "{svg}");
        let svg = plot(vec![(0.0, 0.0), (5.0, 2.0), (10.0, 4.0)]).lines();
        assert!(svg.contains(r#"d="M40 230L190 130L340 30""#), "{svg}");
    }

    #[test]
    fn texts_are_escaped_and_the_figure_is_described() {
        let svg = plot(vec![(1.0, 1.0)]).scatter();
        assert!(svg.contains("&lt;title&gt;</title>"), "{svg}");
        assert!(svg.contains("what &amp; why</desc>"), "{svg}");
        assert!(svg.contains("a&lt;b</text>"), "{svg}");
        assert!(svg.contains(r#"aria-labelledby="p-t p-d""#), "{svg}");
    }

    #[test]
    fn labels_of_near_points_do_not_touch() {
        let mut crowded = plot(vec![(5.0, 2.0)]);
        for (number, point) in [(1, (5.1, 2.02)), (2, (5.2, 1.98)), (3, (4.9, 2.0))] {
            crowded.series.push(Series {
                number,
                label: "4-bit g32 act".into(),
                points: vec![point],
            });
        }
        let svg = crowded.scatter();
        let mut baselines: Vec<&str> = svg
            .lines()
            .filter(|line| line.contains("4-bit g32 act") && line.contains("<text"))
            .collect();
        assert_eq!(baselines.len(), 3);
        baselines.dedup();
        assert_eq!(baselines.len(), 3, "{svg}");
    }
}
