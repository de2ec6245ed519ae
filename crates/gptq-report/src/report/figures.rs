//! Figures of a report and their descriptions.

use gptq_types::LayerLoss;

use super::axis::Axis;
use super::data::{Report, Row};
use super::format::{nats, perplexity};
use super::layers::{Module, against_rtn, by_depth, last_block, modules, place, relative_output};
use super::plot::{Frame, Plot, Rule, Series, label_margin};

/// A figure with what stands below it.
#[derive(Clone, Debug)]
pub(super) struct Figure {
    pub(super) svgs: Vec<String>,
    pub(super) caption: String,
    /// Mark, label and name of each checkpoint, where lines have no labels of their own.
    pub(super) key: Vec<(usize, String, String)>,
}

/// Lines of a small figure that still have room for labels.
const LABELLED: usize = 4;
/// Lines of a wide figure that still have.
const LABELLED_WIDE: usize = 14;
/// Ratios from which a line at 1 is worth the room that it takes.
const NEAR_ONE: f64 = 0.7;

const WIDE: Frame = Frame {
    width: 340.0,
    height: 250.0,
    left: 42.0,
    right: 14.0,
    top: 30.0,
    bottom: 36.0,
};
const SMALL: Frame = Frame {
    width: 270.0,
    height: 170.0,
    left: 34.0,
    right: 8.0,
    top: 22.0,
    bottom: 32.0,
};

/// Size of the files against perplexity on a text.
pub(super) fn size_and_perplexity(report: &Report, text: usize) -> Option<Figure> {
    let (unit, name) = unit(report, text);
    let series: Vec<Series> = (report.branches())
        .filter_map(|(number, row)| {
            let score = row.score(text)?;
            let point = (row.weight_bytes? as f64 / unit, score.perplexity);
            Some(Series {
                number,
                label: row.label.clone(),
                points: vec![point],
            })
        })
        .collect();
    if series.is_empty() {
        return None;
    }
    let reference = report.reference(text).map(|record| record.perplexity);
    let points = || series.iter().flat_map(|s| s.points.iter().copied());
    let described: Vec<String> = (series.iter())
        .map(|s| {
            let (x, y) = s.points[0];
            format!("{}: {x:.3} {name}, perplexity {}", s.label, perplexity(y))
        })
        .collect();
    let line = reference.map(|value| format!("; reference: {}", perplexity(value)));
    let plot = Plot {
        id: format!("size-{text}"),
        title: "Size of the weight files against perplexity".to_string(),
        description: described.join("; ") + &line.unwrap_or_default(),
        heading: None,
        frame: WIDE,
        x: Axis::around_with_room(points().map(|point| point.0)),
        x_title: format!("size, {name}"),
        y: Axis::near(points().map(|point| point.1).chain(reference), 5),
        y_title: "perplexity".to_string(),
        rules: (reference.iter())
            .map(|&y| Rule {
                y,
                label: format!("reference {}", perplexity(y)),
            })
            .collect(),
        series: series.clone(),
    };
    Some(Figure {
        svgs: vec![plot.scatter()],
        caption: format!(
            "Size of the weight files against perplexity; lower and further left is better.{}",
            match reference {
                Some(_) => " The line is the reference.",
                None => "",
            }
        ),
        key: Vec::new(),
    })
}

/// The decimal unit in which the largest branch is a number people can read.
fn unit(report: &Report, text: usize) -> (f64, &'static str) {
    let scored = report
        .branches()
        .filter(|(_, row)| row.score(text).is_some());
    let bytes = scored.filter_map(|(_, row)| row.weight_bytes);
    match bytes.max().unwrap_or(0) {
        bytes if bytes >= 50_000_000 => (1e9, "GB"),
        bytes if bytes >= 1_000_000 => (1e6, "MB"),
        _ => (1e3, "kB"),
    }
}

/// Mean divergence by position in the window.
pub(super) fn kl_by_position(report: &Report, text: usize) -> Option<Figure> {
    let window = report.texts.get(text)?.seq_len as f64;
    let series: Vec<Series> = (report.branches())
        .filter_map(|(number, row)| {
            let parts = &row.score(text)?.kl_by_position;
            let middle = |part: usize| (part as f64 + 0.5) * window / parts.len() as f64;
            let points = parts.iter().enumerate();
            Some(Series {
                number,
                label: row.label.clone(),
                points: points.map(|(part, &kl)| (middle(part), kl)).collect(),
            })
        })
        .filter(|series| !series.points.is_empty())
        .collect();
    let labelled = series.len() <= LABELLED_WIDE;
    let plot = Plot {
        id: format!("position-{text}"),
        title: "Mean KL divergence by position in the window".to_string(),
        description: described(&series, "part", nats),
        heading: None,
        frame: Frame {
            right: if labelled {
                label_margin(&series)
            } else {
                WIDE.right
            },
            ..WIDE
        },
        x: Axis::within(0.0, window, 4),
        x_title: "position, tokens".to_string(),
        y: Axis::of(values(&series), 4),
        y_title: "mean KL, nats".to_string(),
        rules: Vec::new(),
        series: series.clone(),
    };
    (!series.is_empty()).then(|| Figure {
        svgs: vec![plot.lines()],
        caption: "Mean KL divergence from the reference by position: each point is the mean of \
                  one part of the window."
            .to_string(),
        key: match labelled {
            true => Vec::new(),
            false => key(report, &series),
        },
    })
}

/// The quantity that a set of small figures shows for each module.
struct Depth<'a> {
    id: &'a str,
    what: &'a str,
    unit: &'a str,
    rule: Option<f64>,
    value: fn(&LayerLoss) -> Option<f64>,
    /// Whether a branch has a line in a module's figure.
    wanted: &'a dyn Fn(&Row, &Module) -> bool,
}

/// Error over that of rounding to nearest.
pub(super) fn error_against_rtn(report: &Report) -> Option<Figure> {
    let mut depth = Depth {
        id: "rtn",
        what: "Output error over that of rounding to nearest",
        unit: "",
        rule: None,
        value: against_rtn,
        wanted: &|_, _| true,
    };
    let largest = depth.largest(report)?;
    depth.rule = (largest > NEAR_ONE).then_some(1.0);
    let one = match depth.rule {
        Some(_) => "Above the line at 1, plain rounding would have done better.",
        None => "At 1, plain rounding would have done as well.",
    };
    depth.draw(
        report,
        &format!(
            "Output error of each layer over that of rounding the same weights to nearest, by \
             block. {one}"
        ),
    )
}

/// Error relative to the layer's output.
pub(super) fn relative_error(report: &Report) -> Option<Figure> {
    let depth = Depth {
        id: "relative",
        what: "Relative output error",
        unit: "%",
        rule: None,
        value: relative_output,
        wanted: &|_, _| true,
    };
    depth.draw(
        report,
        "Output error of each layer relative to its output, √(error / signal) in percent, by block.",
    )
}

/// Damping in the end, where that is more than was asked for.
pub(super) fn damping(report: &Report) -> Option<Figure> {
    let further = |row: &Row, module: &Module| {
        let damped = row.degraded.iter().flat_map(|found| &found.damped);
        damped
            .filter_map(|layer| place(&layer.layer))
            .any(|(_, path)| path == module.path)
    };
    let mut asked = (report.branches())
        .filter_map(|(_, row)| row.degraded.as_ref()?.damped.first())
        .map(|damped| damped.asked);
    let first = asked.next()?;
    let same = asked.all(|other| other == first);
    let depth = Depth {
        id: "damping",
        what: "Damping that was used",
        unit: "",
        rule: same.then_some(first),
        value: |loss| Some(loss.damp_used),
        wanted: &further,
    };
    let line = if same {
        " The line is what was asked for."
    } else {
        ""
    };
    depth.draw(
        report,
        &format!(
            "Share of the mean Hessian diagonal that was added, by block, for branches and modules \
             where it had to be more than asked for.{line}"
        ),
    )
}

impl Depth<'_> {
    fn largest(&self, report: &Report) -> Option<f64> {
        let modules = modules(report);
        let series = modules.iter().flat_map(|m| self.series(report, m));
        let values = series.flat_map(|s| s.points.into_iter().map(|point| point.1));
        values.reduce(f64::max)
    }

    /// A figure for each module, all with the same axes.
    fn draw(&self, report: &Report, caption: &str) -> Option<Figure> {
        let modules = modules(report);
        let all: Vec<(&Module, Vec<Series>)> = (modules.iter())
            .map(|module| (module, self.series(report, module)))
            .filter(|(_, series)| !series.is_empty())
            .collect();
        let every: Vec<Series> = all.iter().flat_map(|(_, s)| s.clone()).collect();
        let labelled = all.iter().all(|(_, series)| series.len() <= LABELLED);
        let frame = Frame {
            right: if labelled {
                label_margin(&every)
            } else {
                SMALL.right
            },
            ..SMALL
        };
        let y = Axis::of(values(&every).chain(self.rule), 4);
        let x = Axis::blocks(last_block(report), if labelled { 3 } else { 6 });
        let plot = |(module, series): &(&Module, Vec<Series>)| Plot {
            id: format!("{}-{}", self.id, module.path.replace('.', "-")),
            title: format!("{}, {}", self.what, module.path),
            description: described(series, "block", |value| {
                format!("{value:.3} {}", self.unit).trim_end().to_string()
            }),
            heading: Some(match self.unit {
                "" => module.title().to_string(),
                unit => format!("{}, {unit}", module.title()),
            }),
            frame,
            x: x.clone(),
            x_title: "block".to_string(),
            y: y.clone(),
            y_title: String::new(),
            rules: (self.rule.into_iter())
                .map(|y| Rule {
                    y,
                    label: String::new(),
                })
                .collect(),
            series: series.clone(),
        };
        (!all.is_empty()).then(|| Figure {
            svgs: all.iter().map(|panel| plot(panel).lines()).collect(),
            caption: caption.to_string(),
            key: match labelled {
                true => Vec::new(),
                false => key(report, &every),
            },
        })
    }

    fn series(&self, report: &Report, module: &Module) -> Vec<Series> {
        (report.branches())
            .filter(|(_, row)| (self.wanted)(row, module))
            .filter_map(|(number, row)| {
                Some(Series {
                    number,
                    label: row.label.clone(),
                    points: by_depth(row.run.as_ref()?, module, self.value),
                })
            })
            .filter(|series| !series.points.is_empty())
            .collect()
    }
}

fn key(report: &Report, drawn: &[Series]) -> Vec<(usize, String, String)> {
    (report.branches())
        .filter(|(number, _)| drawn.iter().any(|series| series.number == *number))
        .map(|(number, row)| (number, row.label.clone(), row.name.clone()))
        .collect()
}

fn values(series: &[Series]) -> impl Iterator<Item = f64> + Clone {
    let points = series.iter().flat_map(|s| s.points.iter());
    points.map(|point| point.1)
}

/// First, last and largest value of every series in words.
fn described(series: &[Series], step: &str, show: impl Fn(f64) -> String) -> String {
    let each: Vec<String> = (series.iter())
        .filter_map(|s| {
            let (&(_, first), &(_, last)) = (s.points.first()?, s.points.last()?);
            let largest = s.points.iter().map(|point| point.1).fold(first, f64::max);
            Some(format!(
                "{}: {} in the first {step}, {} in the last, {} at most",
                s.label,
                show(first),
                show(last),
                show(largest)
            ))
        })
        .collect();
    each.join("; ")
}
