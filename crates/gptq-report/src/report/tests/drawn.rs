//! Layout of figures.

use super::*;

/// Sizes of 4 and 8 GB: a tenth of room makes 3.6 to 8.4, in steps of 1 from 3 to 9. Perplexities
/// of 20 to 25 in steps of 1. The field is 340 - 42 - 14 wide and 250 - 30 - 36 high.
#[test]
fn marks_are_where_size_and_perplexity_are() {
    let mut report = two_branches();
    report.rows[1].weight_bytes = Some(8_000_000_000);
    let page = report.html().unwrap();
    // 42 + 284 * 5/6 = 278.67; 214 - 184 * 5/5 = 30.
    assert!(page.contains(r#"cx="278.7" cy="30" r="3.6""#), "{page}");
    // The second mark is a square around 42 + 284/6 = 89.33; 214 - 184 * 2/5 = 140.4.
    let (left, top) = (89.333 - 0.9 * 3.6, 140.4 - 0.9 * 3.6);
    let corner = format!(r#"points="{left:.1},{top:.1} "#);
    assert!(page.contains(&corner), "{corner}: {page}");
    // The reference lies on the floor.
    assert!(page.contains(r#"class="rule" d="M42 214H326""#), "{page}");
    assert!(page.contains("reference 20.000</text>"), "{page}");
    assert!(page.contains("size, GB</text>"), "{page}");
}

/// The ratio is 0.5 in both blocks, on an axis from 0 to 0.6 in steps of 0.2 and a field from 138 up
/// to 22; the longer label, of ten characters, takes 10 * 0.6 * 11 + 20 of 270 - 34 units.
#[test]
fn layer_errors_are_drawn_by_block() {
    let page = two_branches().html().unwrap();
    assert!(page.contains("rtn-self_attn-q_proj-t"), "{page}");
    // 138 - 116 * 5/6 = 41.33.
    assert!(page.contains(r#"d="M34 41.3L184 41.3""#), "{page}");
    assert!(
        page.contains("At 1, plain rounding would have done as well."),
        "{page}"
    );
    // √(1/100) is 10 %, √(0.25/100) is 5 %.
    assert!(page.contains("10.000 % in the first block"), "{page}");
    assert!(page.contains("5.000 % in the first block"), "{page}");
    assert!(
        page.contains("No layer was damped further than asked."),
        "{page}"
    );
    assert!(!page.contains("damping-"), "{page}");
    // 2 of 4 over both blocks, 0.5 of 2.
    assert_eq!(
        cells(&after(&two_branches().markdown(), "## Layers"), "main"),
        ["`main`", "0.500", "0.250"]
    );
}

/// Five lines leave no room for labels: a key names them, each by its mark.
#[test]
fn many_lines_get_a_key() {
    let page = two_branches().html().unwrap();
    assert!(!page.contains("class=\"keys\""), "{page}");
    let groups = [16, 32, 64, 128, 256];
    let runs = groups.map(|group| found(&format!("out/g{group}"), run(group)));
    let page = report(runs.to_vec(), Vec::new()).html().unwrap();
    // Two figures by depth.
    assert_eq!(page.matches("class=\"keys\"").count(), 2);
    for group in groups {
        let entry = format!("</svg>4-bit g{group} <small>g{group}</small>");
        assert_eq!(page.matches(&entry).count(), 2, "{page}");
    }
}

#[test]
fn divergence_is_drawn_at_the_middle_of_each_part() {
    let mut report = two_branches();
    report.rows[1].scores[0].record.kl_by_position = vec![0.4, 0.2];
    let page = report.html().unwrap();
    // A quarter and three quarters of 340 - 42 - 86 units; 0.4 is the top of its axis.
    assert!(page.contains(r#"d="M95 30L201 122""#), "{page}");
    let markdown = report.markdown();
    // Windows of 64 in two parts.
    let want = "| to token | main |\n|---|--:|\n| 32 | 0.4000 |\n| 64 | 0.2000 |\n";
    assert!(markdown.contains(want), "{markdown}");
}

#[test]
fn the_page_needs_nothing_beside_itself() {
    let page = two_branches().html().unwrap();
    for outside in [
        "http://", "https://", "src=", "@import", "url(", "<script", "<link",
    ] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.starts_with("<!doctype html>"));
    // Every figure that is not an ornament has a title and a description.
    let figures = page.matches("<svg viewBox").count();
    assert_eq!(figures, 1 + 2 + 2);
    assert_eq!(page.matches("<title id=").count(), figures);
    assert_eq!(page.matches("<desc id=").count(), figures);
}
