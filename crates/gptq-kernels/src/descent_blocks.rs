//! The blocks of channels that coordinate descent takes one after the other: group by group, on the CPU and on
//! a GPU.

use std::ops::Range;

/// Channels of a block at most. The gradient is computed for one block at a time, and the kernel's shared
/// memory is sized for it.
pub const DESCENT_CHANNELS: usize = 128;

/// Consecutive channels of one group in the order of the descent, at most [`DESCENT_CHANNELS`].
#[derive(Debug, PartialEq)]
pub struct DescentBlock {
    /// Range of channels in the order of the descent.
    pub range: Range<usize>,
    /// The quantization group of the channels.
    pub group: usize,
    /// Whether the block holds all channels of its group, so that the scale may be refitted.
    pub is_whole: bool,
    /// The stored channel of the first, if all of them are stored consecutively.
    pub channel: Option<usize>,
}

/// The order of the descent, as stored channels sorted by group, and its blocks. `g_idx [K]` is the group of
/// each stored channel. A group of more than [`DESCENT_CHANNELS`] channels becomes several blocks.
pub fn descent_blocks(g_idx: &[u32]) -> (Vec<u32>, Vec<DescentBlock>) {
    let group_of = |channel: &u32| g_idx[*channel as usize];
    let mut channels: Vec<u32> = (0..g_idx.len() as u32).collect();
    channels.sort_by_key(group_of);
    let mut blocks = Vec::new();
    let mut first = 0;
    for group in channels.chunk_by(|a, b| group_of(a) == group_of(b)) {
        for part in group.chunks(DESCENT_CHANNELS) {
            let in_a_row = part.windows(2).all(|pair| pair[0] + 1 == pair[1]);
            blocks.push(DescentBlock {
                range: first..first + part.len(),
                group: group_of(&part[0]) as usize,
                is_whole: part.len() == group.len(),
                channel: in_a_row.then_some(part[0] as usize),
            });
            first += part.len();
        }
    }
    (channels, blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(
        range: Range<usize>,
        group: usize,
        is_whole: bool,
        channel: Option<usize>,
    ) -> DescentBlock {
        DescentBlock {
            range,
            group,
            is_whole,
            channel,
        }
    }

    #[test]
    fn groups_are_visited_one_after_the_other() {
        let (channels, found) = descent_blocks(&[1, 0, 1, 0, 2, 2]);
        assert_eq!(channels, [1, 3, 0, 2, 4, 5]);
        assert_eq!(
            found,
            [
                block(0..2, 0, true, None),
                block(2..4, 1, true, None),
                block(4..6, 2, true, Some(4))
            ]
        );
        let (stored, found) = descent_blocks(&[0, 0, 1, 2, 2]);
        assert_eq!(stored, [0, 1, 2, 3, 4]);
        assert_eq!(
            found,
            [
                block(0..2, 0, true, Some(0)),
                block(2..3, 1, true, Some(2)),
                block(3..5, 2, true, Some(3))
            ]
        );
    }

    #[test]
    fn long_groups_are_cut_and_their_scales_stay() {
        assert_eq!(
            descent_blocks(&[0; 300]).1,
            [
                block(0..128, 0, false, Some(0)),
                block(128..256, 0, false, Some(128)),
                block(256..300, 0, false, Some(256))
            ]
        );
    }
}
