//! Places labels so that none overlaps another.

/// Width of a character over the size of the type, about.
const CHARACTER: f64 = 0.6;
const TYPE: f64 = 11.0;
/// Height of a line of type.
pub(super) const LINE: f64 = 11.5;
/// Half the width of a mark.
pub(super) const RADIUS: f64 = 3.6;
/// Between a mark and its label.
const GAP: f64 = RADIUS + 3.5;
/// Tried in this order, at growing distances.
const DIRECTIONS: [(f64, f64); 8] = [
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.0, -1.0),
    (0.0, 1.0),
    (0.8, -0.7),
    (0.8, 0.7),
    (-0.8, -0.7),
    (-0.8, 0.7),
];
const DISTANCES: [f64; 4] = [1.0, 2.2, 3.4, 4.8];

/// A rectangle, downwards from `top`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Area {
    pub(super) left: f64,
    pub(super) top: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
}

impl Area {
    pub(super) fn around(x: f64, y: f64, r: f64) -> Self {
        Area {
            left: x - r,
            top: y - r,
            right: x + r,
            bottom: y + r,
        }
    }

    /// Half way down.
    pub(super) fn middle(&self) -> f64 {
        (self.top + self.bottom) / 2.0
    }

    fn meets(&self, other: &Area) -> bool {
        self.left < other.right
            && other.left < self.right
            && self.top < other.bottom
            && other.top < self.bottom
    }

    fn lies_in(&self, other: &Area) -> bool {
        self.left >= other.left
            && self.right <= other.right
            && self.top >= other.top
            && self.bottom <= other.bottom
    }
}

/// A place for a label.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) area: Area,
    /// Whether it is so far from its mark that a line has to join them.
    pub(super) is_far: bool,
}

/// About the width of a text.
pub(super) fn text_width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER * TYPE
}

/// The first free place near a mark for a label of this width, inside of `field`; where nothing is
/// free, the first one inside.
pub(super) fn beside(x: f64, y: f64, width: f64, field: &Area, taken: &[Area]) -> Place {
    let all: Vec<Place> = (DISTANCES.into_iter())
        .flat_map(|far| DIRECTIONS.map(|direction| place(x, y, width, far, direction)))
        .collect();
    let inside = |place: &&Place| place.area.lies_in(field);
    let free = |place: &&Place| taken.iter().all(|other| !place.area.meets(other));
    let found = (all.iter().filter(inside).find(free)).or_else(|| all.iter().find(inside));
    *found.unwrap_or(&all[0])
}

fn place(x: f64, y: f64, width: f64, far: f64, (dx, dy): (f64, f64)) -> Place {
    let left = match dx {
        dx if dx > 0.0 => x + GAP * far * dx,
        dx if dx < 0.0 => x + GAP * far * dx - width,
        _ => x - width / 2.0,
    };
    let middle = y + dy * (GAP * far + LINE / 2.0 - 1.0);
    Place {
        area: Area {
            left,
            top: middle - LINE / 2.0,
            right: left + width,
            bottom: middle + LINE / 2.0,
        },
        is_far: far > 1.0,
    }
}

/// Places at least `gap` apart and inside the ends, close to the wanted ones, in their order.
pub(super) fn apart(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut places = wanted.to_vec();
    let mut floor = low;
    for place in &mut places {
        *place = place.max(floor);
        floor = *place + gap;
    }
    let mut ceiling = high;
    for place in places.iter_mut().rev() {
        *place = place.min(ceiling);
        ceiling = *place - gap;
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_apart_in_their_order() {
        let places = apart(&[10.0, 11.0, 50.0], 10.0, 0.0, 100.0);
        assert_eq!(places, [10.0, 20.0, 50.0]);
        assert_eq!(apart(&[95.0, 99.0], 10.0, 0.0, 100.0), [90.0, 100.0]);
        assert_eq!(apart(&[-5.0, 3.0], 10.0, 0.0, 100.0), [0.0, 10.0]);
    }

    #[test]
    fn a_label_takes_the_first_free_place() {
        let field = Area {
            left: 0.0,
            top: 0.0,
            right: 100.0,
            bottom: 100.0,
        };
        let right = beside(20.0, 50.0, 30.0, &field, &[]);
        assert_eq!((right.area.left, right.area.middle()), (20.0 + GAP, 50.0));
        // No room at the right end, then none there either.
        let left = beside(90.0, 50.0, 30.0, &field, &[]);
        assert_eq!(left.area.right, 90.0 - GAP);
        let above = beside(90.0, 50.0, 18.0, &field, &[left.area]);
        assert!(above.area.bottom < 50.0 && !above.is_far);
        // Everything near is taken.
        let far = beside(50.0, 50.0, 20.0, &field, &[Area::around(50.0, 50.0, 12.0)]);
        assert!(far.is_far && !far.area.meets(&Area::around(50.0, 50.0, 12.0)));
    }
}
