//! Rotary settings as files spell them: what is read, and what contradicts itself.

use super::*;

fn scaling(json: &str) -> (f64, RopeScaling) {
    let json: serde_json::Value = serde_json::from_str(json).unwrap();
    let rope = read(&Fields(&json), 4096, &Reads::LLAMA).unwrap();
    (rope.theta, rope.scaling)
}

/// Half a head was rotated whole, the base of a block inside the block fell back to 10000, and a
/// factor of 0 made frequencies that are not finite.
#[test]
fn settings_that_would_be_lost_or_divide_by_zero_are_refused() {
    for (json, named) in [
        (
            r#"{"rope_parameters": {"partial_rotary_factor": 0.5}}"#,
            "partial_rotary_factor",
        ),
        (
            r#"{"rope_parameters": {"full_attention": {"rope_theta": 500000.0}}}"#,
            "full_attention",
        ),
        (r#"{"rope_theta": 0}"#, "rope_theta"),
        (r#"{"rope_theta": -1e4}"#, "rope_theta"),
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 0.0}}"#,
            "factor",
        ),
        (
            r#"{"rope_scaling": {"type": "yarn", "factor": 4, "truncate": false}}"#,
            "truncate",
        ),
        (
            r#"{"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 1}}"#,
            "high_freq_factor",
        ),
        (
            r#"{"rope_scaling": {"type": "dynamic", "factor": 2,
                "original_max_position_embeddings": 0}}"#,
            "original_max_position_embeddings",
        ),
        (
            r#"{"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}}"#,
            "rope_theta",
        ),
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "default"}}"#,
            "rope_type",
        ),
        // transformers takes the second whole: its base is the default one
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 5e5},
                "rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 1e6}}"#,
            "`rope_theta` twice",
        ),
        (
            r#"{"rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"type": "linear", "factor": 2, "rope_theta": 1e6}}"#,
            "`rope_theta` twice",
        ),
        (
            r#"{"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}}"#,
            "`rope_type` twice",
        ),
    ] {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        let error = read(&Fields(&json), 4096, &Reads::LLAMA)
            .unwrap_err()
            .to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// The one in the block was taken without a word.
#[test]
fn a_part_that_turns_and_is_told_twice_has_to_be_one() {
    let reads = Reads {
        partial: Some(0.5),
        query_factor: true,
        ..Reads::LLAMA
    };
    let read = |json: &str| {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        let rope = read(&Fields(&json), 4096, &reads);
        rope.map(|rope| rope.partial)
            .map_err(|error| error.to_string())
    };
    for place in ["rope_parameters", "rope_scaling"] {
        let both = |outer: &str, inner: &str| {
            read(&format!(
                r#"{{"partial_rotary_factor": {outer}, "{place}": {{"partial_rotary_factor": {inner}}}}}"#
            ))
        };
        let error = both("0.5", "0.25").unwrap_err();
        assert!(error.contains("`partial_rotary_factor` twice"), "{error}");
        assert_eq!(both("0.25", "0.25"), Ok(0.25));
        assert_eq!(both("null", "0.25"), Ok(0.25));
        assert_eq!(both("0.25", "null"), Ok(0.25));
    }
    for (first, second) in [
        (r#""partial_rotary_factor": 1.0"#, ""),
        (
            r#""llama_4_scaling_beta": 0.1"#,
            r#""llama_4_scaling_beta": 0.2"#,
        ),
    ] {
        let json = format!(
            r#"{{"rope_parameters": {{"type": "default", {first}}},
                "rope_scaling": {{"type": "default"{}{second}}}}}"#,
            if second.is_empty() { "" } else { "," }
        );
        assert!(read(&json).unwrap_err().contains("twice"), "{json}");
    }
    assert_eq!(
        read(r#"{"rope_parameters": {}, "rope_scaling": {}}"#),
        Ok(0.5)
    );
}

/// The base beside the scaling of full attention was not looked at.
#[test]
fn kinds_of_layers_and_the_older_spelling_have_to_be_one() {
    let read = |json: &str| {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        let kinds = read_kinds(&Fields(&json), 4096, [&Reads::LLAMA; 2], Some("local"));
        let bases = kinds.map(|kinds| [kinds.sliding.theta, kinds.full.theta]);
        bases.map_err(|error| error.to_string())
    };
    let kinds = r#""rope_parameters": {"full_attention": {"rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4}}"#;
    for beside in [
        r#""rope_scaling": {"rope_theta": 5e5}"#,
        r#""rope_scaling": {"rope_type": "linear", "factor": 8.0}"#,
        r#""rope_theta": 5e5"#,
        r#""local": 5e5"#,
    ] {
        let error = read(&format!("{{{kinds}, {beside}}}")).unwrap_err();
        assert!(error.contains("twice"), "{error}");
    }
    let same = r#""rope_scaling": {"rope_type": "default"}, "rope_theta": 1e6"#;
    assert_eq!(read(&format!("{{{kinds}, {same}}}")), Ok([1e4, 1e6]));
    let older = r#"{"rope_scaling": {"rope_theta": 5e5, "type": "linear", "factor": 2}}"#;
    assert_eq!(read(older), Ok([1e4, 5e5]));
}

/// Values of transformers 4.46 `ROPE_INIT_FUNCTIONS`, recomputed from their formulas in
/// arbitrary precision; head width 8.
#[test]
fn frequencies_of_every_scaling() {
    let (theta, linear) =
        scaling(r#"{"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_theta": 10000.0}"#);
    let got = linear.inverse_frequencies(8, theta, 2048);
    for (got, want) in got.iter().zip([0.125, 0.0125, 0.00125, 0.000125]) {
        assert!((got / want - 1.0).abs() < 1e-12);
    }

    let (theta, dynamic) = scaling(r#"{"rope_scaling": {"type": "dynamic", "factor": 2.0}}"#);
    assert_eq!(
        dynamic.inverse_frequencies(8, theta, 4096),
        RopeScaling::None.inverse_frequencies(8, theta, 4096)
    );
    let grown = dynamic.inverse_frequencies(8, theta, 8192);
    let base: f64 = 10_000.0 * 3.0f64.powf(8.0 / 6.0);
    assert!((grown[1] / base.powf(-0.25) - 1.0).abs() < 1e-12);

    let (theta, llama3) = scaling(
        r#"{"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}"#,
    );
    let plain = RopeScaling::None.inverse_frequencies(8, theta, 0);
    let got = llama3.inverse_frequencies(8, theta, 0);
    assert_eq!(theta, 500_000.0);
    assert_eq!(got[0], plain[0]);
    assert!((got[3] * 8.0 / plain[3] - 1.0).abs() < 1e-12);
    let turns = 8192.0 * plain[2] / (2.0 * PI);
    let smooth = (turns - 1.0) / 3.0;
    let want = (1.0 - smooth) * plain[2] / 8.0 + smooth * plain[2];
    assert!((got[2] / want - 1.0).abs() < 1e-12, "{turns}");

    let (theta, yarn) = scaling(
        r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 32768}, "rope_theta": 1000000.0}"#,
    );
    let got = yarn.inverse_frequencies(128, theta, 0);
    let plain = RopeScaling::None.inverse_frequencies(128, theta, 0);
    assert_eq!(got[0], plain[0]);
    assert!((got[63] * 4.0 / plain[63] - 1.0).abs() < 1e-12);
    let RopeScaling::Yarn {
        attention_factor, ..
    } = yarn
    else {
        panic!("not yarn");
    };
    assert!((attention_factor - (0.1 * 4.0f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn an_unknown_scaling_is_refused_by_name() {
    let json: serde_json::Value =
        serde_json::from_str(r#"{"rope_scaling": {"rope_type": "longrope"}}"#).unwrap();
    let error = read(&Fields(&json), 4096, &Reads::LLAMA)
        .unwrap_err()
        .to_string();
    assert!(error.contains("longrope"), "{error}");
}
