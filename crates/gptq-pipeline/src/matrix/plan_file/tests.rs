//! Plan files: valid ones and errors.

use super::*;

fn read(text: &str) -> Result<Vec<Permutation>, String> {
    read_plan(text, None, Effort::default()).map_err(|error| error.to_string())
}

#[test]
fn branches_inherit_and_override() {
    let plan = "
        dataset = 'rows.jsonl'
        column = 'body'
        seq_len = 512
        [[branch]]
        name = 'main'
        bits = 4
        group_size = 64
        [[branch]]
        bits = 8
        group_size = 'none'
        desc_act = true
        damp = 0.01
        samples = 16
        [[branch]]
        bits = 3
        group_size = 64
        dataset = 'c4'
    ";
    let [main, eight, three] = read(plan).unwrap().try_into().unwrap();
    assert_eq!(main.branch, "main");
    assert_eq!(main.calibration.dataset, "rows.jsonl");
    let columns = [&main, &eight, &three].map(|branch| branch.calibration.column.as_deref());
    assert_eq!(columns, [Some("body"), Some("body"), None]);
    assert_eq!(
        (main.calibration.samples, main.calibration.seq_len),
        (128, 512)
    );
    assert_eq!(main.spec.damp_percent, 0.1);
    assert_eq!(eight.branch, "gptq-8bit--1g-actorder_True");
    assert_eq!(
        (eight.calibration.samples, eight.calibration.seq_len),
        (16, 512)
    );
    assert_eq!(eight.spec.damp_percent, 0.01);
}

#[test]
fn windows_begin_with_bos_where_the_plan_says_so() {
    let branch = |name: &str, rest: &str| {
        format!("[[branch]]\nname = '{name}'\nbits = 4\ngroup_size = 64\n{rest}\n")
    };
    let two = branch("main", "") + &branch("own", "window_bos = false");
    let asked = |plan: &str| -> Vec<Option<bool>> {
        let branches = read(plan).unwrap();
        (branches.iter())
            .map(|branch| branch.calibration.window_bos)
            .collect()
    };
    assert_eq!(
        asked(&format!("window_bos = true\n{two}")),
        [Some(true), Some(false)]
    );
    assert_eq!(asked(&two), [None, Some(false)]);
    // An unset key is not written, so matrices that predate the setting can be resumed.
    let plain = &read(&two).unwrap()[0].calibration;
    assert!(!serde_json::to_string(plain).unwrap().contains("bos"));
    let error = read(&branch("main", "window_bos = 1")).unwrap_err();
    assert!(error.contains("line 5"), "{error}");
}

/// `tokens` becomes the number of windows that hold them, of the branch's final window length.
#[test]
fn tokens_are_counted_in_windows_of_the_branch() {
    let plan = "
        tokens = 5000
        [[branch]]
        name = 'all'
        bits = 4
        group_size = 64
        [[branch]]
        name = 'short'
        bits = 4
        group_size = 64
        seq_len = 512
        [[branch]]
        name = 'counted'
        bits = 4
        group_size = 64
        samples = 7
        [[branch]]
        name = 'own'
        bits = 4
        group_size = 64
        tokens = 2048
    ";
    let samples = |seq_len| -> Vec<usize> {
        let branches = read_plan(plan, seq_len, Effort::default()).unwrap();
        (branches.iter())
            .map(|branch| branch.calibration.samples)
            .collect()
    };
    assert_eq!(samples(None), [3, 10, 7, 1]);
    assert_eq!(samples(Some(100)), [50, 50, 7, 21]);
    let counted = plan.replace("tokens = 5000", "samples = 9");
    let branches = read(&counted).unwrap();
    assert_eq!(branches[0].calibration.samples, 9);
    assert_eq!(branches[3].calibration.samples, 1);
}

/// These settings once shared a branch name, so a plan with two of them was refused.
#[test]
fn what_makes_other_codes_has_another_name() {
    let plan = [
        "",
        "effort = 'fast'",
        "input_mismatch = 0.25",
        "unsigned_scales = true",
        "unsigned_scales = true\neffort = 'fast'",
    ]
    .map(|rest| format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}\n"))
    .concat();
    let branches = read(&plan).unwrap();
    let names: Vec<&str> = (branches.iter())
        .map(|branch| {
            let name = branch.branch.strip_prefix("gptq-4bit-64g-actorder_False");
            name.unwrap()
        })
        .collect();
    let wanted = [
        "",
        "-fast",
        "-mismatch_0.25-descent_2",
        "-unsigned",
        "-fast-unsigned",
    ];
    assert_eq!(names, wanted);
}

/// `samples = 4611686018427387904` once wrapped: the estimate was `0 s | 158 MB`.
#[test]
fn what_no_run_can_have_is_refused_before_any_is_estimated() {
    let checked = |rest: &str| {
        let plan = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
        let asked = read_plan(&plan, None, Effort::default())?;
        check_permutations(&asked)
    };
    checked("samples = 1048576").unwrap();
    let long = format!("desc = '{}'", "x".repeat(1001));
    for (rest, named) in [
        (
            "samples = 4611686018427387904",
            "samples `4611686018427387904`",
        ),
        ("samples = 0", "samples `0`"),
        ("samples = -1", "line 4"),
        ("samples = 99999999999999999999", "line"),
        (
            "seq_len = 9223372036854775807",
            "seq_len `9223372036854775807`",
        ),
        ("seq_len = 0", "seq_len `0`"),
        ("damp = nan", "damp"),
        ("damp = inf", "damp"),
        ("dataset = \"a\\u0000b\"", "holds a control character"),
        ("desc = \"a\\nb\"", "holds a control character"),
        (&long, "desc has 1001 bytes"),
        ("unknown = 1", "unknown field `unknown`"),
        ("samples = 1\nsamples = 2", "duplicate"),
    ] {
        let error = checked(rest).expect_err(rest).to_string();
        assert!(error.contains(named), "{error}");
        assert!(!error.contains('\n') && error.len() < 400, "{error}");
    }
    let many = "[[branch]]\nbits = 4\ngroup_size = 64\nname = 'X'\n";
    let many: String = (0..300)
        .map(|index| many.replace('X', &format!("b{index}")))
        .collect();
    let error =
        check_permutations(&read_plan(&many, None, Effort::default()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("300 branches"), "{error}");
    assert!(read_plan(&"#".repeat(MAX_PLAN_BYTES + 1), None, Effort::default()).is_err());
}

#[test]
fn orders_have_names_of_their_own() {
    let made = |rest: &str| {
        let text = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
        let made = read(&text).unwrap().remove(0);
        (made.spec.order, made.branch)
    };
    for (short, flags) in [
        ("natural", ""),
        ("act-order", "desc_act = true"),
        ("static", "desc_act = true\nstatic_groups = true"),
        ("group-aware", "act_group_aware = true"),
    ] {
        assert_eq!(made(&format!("order = '{short}'")), made(flags), "{short}");
    }
    for order in [ColumnOrder::Folded, ColumnOrder::Auto] {
        let made = made(&format!("order = '{}'", order.name()));
        let branch = format!("gptq-4bit-64g-actorder_{}", order.name());
        assert_eq!(made, (order, branch));
    }
    assert_eq!(made("order = 'static'").1, "gptq-4bit-64g-actorder_static");
}

#[test]
fn grids_and_the_aim_are_those_of_quantize() {
    let spec = |rest: &str| {
        let text = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
        let spec = read(&text).unwrap()[0].spec.clone();
        let grids = (spec.scale_search, spec.full_range);
        (grids, spec.input_mismatch, spec.descent_passes)
    };
    let searched = (true, true);
    assert_eq!(spec(""), (searched, 0.5, 2));
    assert_eq!(spec("effort = 'fast'"), (searched, 0.0, 0));
    assert_eq!(spec("effort = 'balanced'"), (searched, 0.5, 2));
    assert_eq!(spec("input_mismatch = 0.25"), (searched, 0.25, 2));
    assert_eq!(spec("descent_passes = 3"), (searched, 0.5, 3));
    let part = "effort = 'balanced'\ndescent_passes = 0";
    assert_eq!(spec(part), (searched, 0.5, 0), "a part of an effort");
    assert_eq!(spec("unsigned_scales = true"), ((true, false), 0.5, 2));
    assert_eq!(spec("no_scale_search = true"), ((false, false), 0.5, 2));
    assert_eq!(spec("method = 'rtn'"), ((false, false), 0.0, 0));
}

/// By its bits, unless the plan says how many; the name of the branch says what is not the effort's own.
#[test]
fn epochs_are_those_of_the_effort_or_of_the_plan() {
    let made = |bits: u32, rest: &str| {
        let text = format!("[[branch]]\nbits = {bits}\ngroup_size = 64\n{rest}");
        let branch = read(&text).unwrap().remove(0);
        let named = branch
            .branch
            .split_once("False")
            .map(|parts| parts.1.to_string());
        (branch.spec.training_epochs, named.unwrap())
    };
    assert_eq!(made(4, ""), (0, String::new()));
    assert_eq!(made(4, "effort = 'best'"), (6, "-best".to_string()));
    assert_eq!(made(2, "effort = 'best'"), (12, "-best".to_string()));
    let four = "effort = 'best'\ntraining_epochs = 4";
    let name = "-mismatch_0.5-descent_2-epochs_4".to_string();
    assert_eq!(made(4, four), (4, name.clone()));
    assert_eq!(made(4, "training_epochs = 4"), (4, name));
}

#[test]
fn what_a_plan_gets_wrong_is_named() {
    let entry = |rest: &str| format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
    for (plan, named) in [
        (String::new(), "no [[branch]]"),
        (entry("bit = 4"), "unknown field `bit`"),
        (
            entry("[[branch]]\nbits = 4\ngroup_size = 64\ndamp = 0.2"),
            "branches 1 and 2 would both be `gptq-4bit-64g-actorder_False`",
        ),
        (
            entry("name = 'a'\n[[branch]]\nbits = 8\ngroup_size = 64\nname = 'a'"),
            "branch `a` is listed twice",
        ),
        (
            entry("samples = 8\ntokens = 4096"),
            "tokens stands for samples",
        ),
        (
            format!("samples = 8\ntokens = 4096\n{}", entry("")),
            "tokens stands for samples",
        ),
        (entry("tokens = 0"), "nonzero"),
        (entry("").replace("64", "63"), "group size `63`"),
        (entry("").replace('4', "5"), "bits `5`"),
        (
            entry("static_groups = true"),
            "static_groups is for desc_act",
        ),
        (entry("damp = 1.5"), "damp percent `1.5`"),
        (
            entry("order = 'static'\ndesc_act = true"),
            "order stands for",
        ),
        (entry("order = 'sorted'"), "unknown variant `sorted`"),
        (entry("input_mismatch = 1.5"), "input mismatch `1.5`"),
        (entry("effort = 'better'"), "unknown variant `better`"),
        (entry("training_epochs = 65"), "training epochs `65`"),
        (
            entry("effort = 'fast'\ntraining_epochs = 4"),
            "`training epochs` and `an input mismatch of 0` exclude each other",
        ),
        (
            entry("method = 'rtn'\ntraining_epochs = 1"),
            "method rtn looks at no data",
        ),
        (
            entry("method = 'rtn'\neffort = 'balanced'"),
            "method rtn looks at no data",
        ),
        (entry("descent_passes = 17"), "descent passes `17`"),
        (
            entry("method = 'rtn'\ndescent_passes = 1"),
            "method rtn looks at no data",
        ),
        (
            entry("method = 'rtn'\nunsigned_scales = true"),
            "method rtn looks at no data",
        ),
        (
            entry("unsigned_scales = true\nno_scale_search = true"),
            "exclude each other",
        ),
        (format!("datset = 'c4'\n{}", entry("")), "datset"),
    ] {
        let error = read(&plan).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}
