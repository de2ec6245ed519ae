//! The order in which coordinate descent visits the channels of a linear: group by group, on the processor
//! and on a GPU.

use std::ops::Range;

/// Channels whose gradient is computed at a time; the kernel's shared memory is cut for it.
pub const VISIT_CHANNELS: usize = 128;

/// A run of places of one group, at most [`VISIT_CHANNELS`] long.
#[derive(Debug, PartialEq)]
pub struct Visit {
    /// Places among the channels in the order of the visits.
    pub places: Range<usize>,
    /// Their group.
    pub group: usize,
    /// Whether they are all of the group, so that its scale may move.
    pub is_whole: bool,
    /// The stored channel of the first, where the others are stored behind it in a row.
    pub channel: Option<usize>,
}

/// Stored channels by group, those of a group in stored order, and the visits to them. `g_idx [K]` is the
/// group of each stored channel; a longer group is cut.
pub fn visits(g_idx: &[u32]) -> (Vec<u32>, Vec<Visit>) {
    let group_of = |channel: &u32| g_idx[*channel as usize];
    let mut channels: Vec<u32> = (0..g_idx.len() as u32).collect();
    channels.sort_by_key(group_of);
    let mut visits = Vec::new();
    let mut first = 0;
    for group in channels.chunk_by(|a, b| group_of(a) == group_of(b)) {
        for part in group.chunks(VISIT_CHANNELS) {
            let in_a_row = part.windows(2).all(|pair| pair[0] + 1 == pair[1]);
            visits.push(Visit {
                places: first..first + part.len(),
                group: group_of(&part[0]) as usize,
                is_whole: part.len() == group.len(),
                channel: in_a_row.then_some(part[0] as usize),
            });
            first += part.len();
        }
    }
    (channels, visits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(places: Range<usize>, group: usize, is_whole: bool, channel: Option<usize>) -> Visit {
        Visit {
            places,
            group,
            is_whole,
            channel,
        }
    }

    #[test]
    fn groups_are_visited_one_after_the_other() {
        let (channels, found) = visits(&[1, 0, 1, 0, 2, 2]);
        assert_eq!(channels, [1, 3, 0, 2, 4, 5]);
        assert_eq!(
            found,
            [
                visit(0..2, 0, true, None),
                visit(2..4, 1, true, None),
                visit(4..6, 2, true, Some(4))
            ]
        );
        let (stored, found) = visits(&[0, 0, 1, 2, 2]);
        assert_eq!(stored, [0, 1, 2, 3, 4]);
        assert_eq!(
            found,
            [
                visit(0..2, 0, true, Some(0)),
                visit(2..3, 1, true, Some(2)),
                visit(3..5, 2, true, Some(3))
            ]
        );
    }

    #[test]
    fn long_groups_are_cut_and_their_scales_stay() {
        assert_eq!(
            visits(&[0; 300]).1,
            [
                visit(0..128, 0, false, Some(0)),
                visit(128..256, 0, false, Some(128)),
                visit(256..300, 0, false, Some(256))
            ]
        );
    }
}
