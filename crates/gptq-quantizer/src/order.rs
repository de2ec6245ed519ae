//! In which order input channels are rounded, and which grid each one uses.

use gptq_types::{ColumnOrder, GroupSize};

/// A processing order over `K` input channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// `[K]`: the channel that is rounded at each position.
    pub channels: Vec<usize>,
    /// `[K]`: the group of the channel at each position. Positions of one group are adjacent
    /// unless `fixed_grids`.
    pub groups: Vec<u32>,
    /// Whether the grids come from the original weights instead of those that carry the errors of
    /// all positions before.
    pub fixed_grids: bool,
}

impl Order {
    /// The order for a Hessian diagonal `[K]`; ties keep the stored order. Of the orders that depend on
    /// more than the diagonal, `Folded` is [`Order::folded`] without heads, and `Auto` natural until one is
    /// chosen.
    pub fn new(order: ColumnOrder, group_size: GroupSize, diagonal: &[f32]) -> Self {
        let k = diagonal.len();
        let size = group_size.resolve(k);
        let natural: Vec<usize> = (0..k).collect();
        let channels = match order {
            ColumnOrder::Natural | ColumnOrder::Auto => natural,
            ColumnOrder::ActOrder | ColumnOrder::ActOrderStaticGroups | ColumnOrder::Folded => {
                falling(natural, |&channel| diagonal[channel])
            }
            ColumnOrder::GroupAware => group_aware(diagonal, size),
        };
        let groups = match order {
            ColumnOrder::ActOrder | ColumnOrder::Folded => consecutive(k, size),
            _ => channels.iter().map(|c| (c / size) as u32).collect(),
        };
        Order {
            channels,
            groups,
            fixed_grids: order == ColumnOrder::ActOrderStaticGroups,
        }
    }

    /// Act-order that stays inside runs of `run` channels, and is the same in `sharing` runs one after
    /// the other: heads, and the query heads of one key-value head. Groups are formed in that order.
    pub fn folded(group_size: GroupSize, diagonal: &[f32], run: usize, sharing: usize) -> Self {
        let k = diagonal.len();
        let mut channels = Vec::with_capacity(k);
        for start in (0..k).step_by(run * sharing) {
            let of_place = |&place: &usize| -> f32 {
                let runs = (0..sharing).map(|at| diagonal[start + at * run + place]);
                runs.sum()
            };
            let places = falling((0..run).collect(), of_place);
            for at in 0..sharing {
                channels.extend(places.iter().map(|place| start + at * run + place));
            }
        }
        Order {
            channels,
            groups: consecutive(k, group_size.resolve(k)),
            fixed_grids: false,
        }
    }

    /// `[K]`: the group of each channel in stored order, as the file has it.
    pub fn g_idx(&self) -> Vec<u32> {
        let mut g_idx = vec![0; self.channels.len()];
        for (&channel, &group) in self.channels.iter().zip(&self.groups) {
            g_idx[channel] = group;
        }
        g_idx
    }

    /// The end of the block of at most `limit` positions that begins at `first`. Blocks end where
    /// groups end, so that a grid is always fitted to weights that already carry every error
    /// passed on before it; only a group that is longer than a block is cut.
    pub fn block_end(&self, first: usize, limit: usize) -> usize {
        let limit = self.channels.len().min(first + limit);
        if self.fixed_grids {
            return limit;
        }
        let mut end = self.group_end(first).min(limit);
        // The rest of a long group stands alone: its grid is fitted already, those of others not.
        while self.begins_group(first) && end < limit {
            let next = self.group_end(end);
            if next > limit {
                break;
            }
            end = next;
        }
        end
    }

    /// Whether a group begins at `position`.
    pub fn begins_group(&self, position: usize) -> bool {
        position == 0 || self.groups[position - 1] != self.groups[position]
    }

    /// The end of the run of positions that share the group of `position`.
    pub fn group_end(&self, position: usize) -> usize {
        let group = self.groups[position];
        position
            + self.groups[position..]
                .iter()
                .take_while(|&&g| g == group)
                .count()
    }
}

/// Groups of `size` positions.
fn consecutive(k: usize, size: usize) -> Vec<u32> {
    (0..k).map(|position| (position / size) as u32).collect()
}

/// Groups by their largest diagonal, channels sorted inside; every group keeps its channels.
fn group_aware(diagonal: &[f32], size: usize) -> Vec<usize> {
    let channels: Vec<usize> = (0..diagonal.len()).collect();
    let groups: Vec<Vec<usize>> = channels
        .chunks(size)
        .map(|group| falling(group.to_vec(), |&channel| diagonal[channel]))
        .collect();
    falling(groups, |group| diagonal[group[0]]).concat()
}

fn falling<T>(mut items: Vec<T>, key: impl Fn(&T) -> f32) -> Vec<T> {
    items.sort_by(|a, b| key(b).total_cmp(&key(a)));
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIAGONAL: [f32; 5] = [1.0, 5.0, 2.0, 9.0, 4.0];

    fn order(order: ColumnOrder) -> Order {
        let mut made = Order::new(order, GroupSize::None, &DIAGONAL);
        // Two channels a group: smaller than any group a user may ask for.
        made.groups = match order {
            ColumnOrder::ActOrder => vec![0, 0, 1, 1, 2],
            _ => made.channels.iter().map(|c| (c / 2) as u32).collect(),
        };
        made
    }

    #[test]
    fn act_order_permutes_g_idx_and_static_groups_do_not() {
        let act = order(ColumnOrder::ActOrder);
        assert_eq!(act.channels, [3, 1, 4, 2, 0]);
        assert_eq!(act.g_idx(), [2, 0, 1, 0, 1]);
        let fixed = order(ColumnOrder::ActOrderStaticGroups);
        assert_eq!(fixed.channels, act.channels);
        assert_eq!(fixed.g_idx(), [0, 0, 1, 1, 2]);
        assert!(fixed.fixed_grids);
    }

    #[test]
    fn a_folded_order_stays_inside_heads_that_share_a_permutation() {
        // Two key-value heads of two query heads with two channels each.
        let diagonal = [1.0, 5.0, 3.0, 2.0, 4.0, 1.0, 0.0, 9.0];
        let order = Order::folded(GroupSize::Channels(16), &diagonal, 2, 2);
        assert_eq!(order.channels, [1, 0, 3, 2, 5, 4, 7, 6]);
        let whole = Order::folded(GroupSize::Channels(16), &diagonal, 8, 1);
        let act = Order::new(ColumnOrder::ActOrder, GroupSize::Channels(16), &diagonal);
        assert_eq!(whole, act);
        let named = Order::new(ColumnOrder::Folded, GroupSize::Channels(16), &diagonal);
        assert_eq!(named, act);
    }

    #[test]
    fn group_aware_keeps_groups_together() {
        assert_eq!(group_aware(&DIAGONAL, 2), [3, 2, 1, 0, 4]);
        let order = order(ColumnOrder::Natural);
        assert_eq!(order.group_end(2), 4);
        assert_eq!(order.group_end(4), 5);
    }
}
