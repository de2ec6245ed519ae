//! The solver against GPTQ written a second time: `scripts/witness.py` computes in f64, from the
//! papers and without a line of this program, what the first block of the fixture becomes.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_packer::{QuantizeConfig, SafetensorsFile, read_layer};
use gptq_types::{LayerName, SolvedLayer, TensorSource};
use half::f16;

use crate::support::{fixture, gptq, run};

/// A weight on the boundary between two codes may fall either way: f32 sums are accurate to about 1e-6 of
/// a step, so one or two of 400,000 codes lie there, and a scale next to an f16 boundary moves the codes of
/// its group. Later differences in that output are consequences.
const OUTPUTS_OF_ONE_THAT_DIFFERS: usize = 500;
/// After a linear that differs, inputs differ too, so the rest of that setting is not compared.
const LEAST_CODES_COMPARED: usize = 250_000;

/// Linears of a block that share an input, first to last.
const STAGES: [&[&str]; 4] = [
    &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    &["self_attn.o_proj"],
    &["mlp.gate_proj", "mlp.up_proj"],
    &["mlp.down_proj"],
];

/// The golden's data for one setting: `4bit-64g-v1-asym-act-search`.
struct Setting<'a> {
    name: &'a str,
    parts: Vec<&'a str>,
}

impl<'a> Setting<'a> {
    fn new(name: &'a str) -> Self {
        let parts = name.split('-').collect();
        Setting { name, parts }
    }

    fn bits(&self) -> usize {
        self.parts[0].strip_suffix("bit").unwrap().parse().unwrap()
    }

    fn sym(&self) -> bool {
        self.parts[3] == "sym"
    }

    fn flags(&self) -> Vec<String> {
        let group = self.parts[1].strip_suffix('g').unwrap();
        let mut flags = vec![
            format!("--bits={}", self.bits()),
            format!("--group-size={}", if group == "no" { "-1" } else { group }),
            format!("--{}", self.parts[3]),
        ];
        let more: &[&str] = match self.parts[4] {
            "natural" => &[],
            "act" => &["--desc-act"],
            "static" => &["--desc-act", "--static-groups"],
            "aware" => &["--act-group-aware"],
            other => panic!("`{other}` is no order"),
        };
        flags.extend(more.iter().map(|flag| flag.to_string()));
        if self.parts[2] == "v2" {
            flags.push("--format=gptq_v2".to_string());
        }
        if self.parts.len() == 5 {
            flags.push("--no-scale-search".to_string());
        } else {
            flags.push("--unsigned-scales".to_string());
        }
        flags
    }
}

/// Fields of `bits` bits, least significant first, without a gap.
fn fields(stream: &[u8], bits: usize) -> Vec<u8> {
    let bit = |at: usize| (stream[at / 8] >> (at % 8)) & 1;
    let code = |index: usize| (0..bits).map(|of| bit(index * bits + of) << of).sum();
    (0..stream.len() * 8 / bits).map(code).collect()
}

/// Number of compared codes, and of outputs in which a code or a scale differs.
#[derive(Debug, Default)]
struct Count {
    codes: usize,
    outputs: usize,
    other_outputs: usize,
}

impl Count {
    /// Holds a layer against the golden's part of it. Zeros and groups are whole numbers that no
    /// rounding of sums is near.
    fn add(&mut self, golden: &SafetensorsFile, setting: &Setting, name: &str, got: &SolvedLayer) {
        let what = format!("{}/{name}", setting.name);
        let part = |part: &str| golden.bytes(&format!("{what}.{part}"));
        let (outputs, mut other) = (got.out_features, BTreeSet::new());
        let codes = fields(&part("codes").unwrap(), setting.bits());
        assert_eq!(codes.len(), got.codes.len(), "{what}");
        for (at, (&ours, &theirs)) in got.codes.iter().zip(&codes).enumerate() {
            let away = ours.abs_diff(theirs);
            assert!(away <= 1, "{what}: code {at} is {ours}, not {theirs}");
            if away == 1 {
                other.insert(at % outputs);
            }
        }
        let scales = part("scales").unwrap();
        let scales = scales.as_chunks::<2>().0.iter();
        let scales = scales.map(|bytes| f16::from_le_bytes(*bytes).to_bits());
        for (at, (ours, theirs)) in got.scales.iter().zip(scales).enumerate() {
            // neighbours in f16 are neighbours as whole numbers
            let away = ours.to_bits().abs_diff(theirs);
            assert!(
                away <= 1 || other.contains(&(at % outputs)),
                "{what}: scale {at}"
            );
            if away == 1 {
                other.insert(at % outputs);
            }
        }
        self.codes += codes.len();
        self.outputs += outputs;
        self.other_outputs += other.len();

        let zeros = match setting.sym() {
            true => vec![1 << (setting.bits() - 1); got.zeros.len()],
            false => part("zeros").unwrap(),
        };
        let zeros = zeros.into_iter().map(u16::from);
        assert!(got.zeros.iter().copied().eq(zeros), "{what}: zeros");
        if setting.parts[4] == "act" {
            let groups = part("g_idx").unwrap().into_iter().map(u32::from);
            assert!(got.g_idx.iter().copied().eq(groups), "{what}: g_idx");
        } else {
            assert!(got.g_idx.is_sorted(), "{what}: g_idx");
        }
    }
}

#[test]
fn codes_of_the_first_block_are_those_of_plain_numpy_in_f64() {
    let golden = SafetensorsFile::open(&fixture("witness.safetensors")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let names = golden.names();
    let settings: BTreeSet<&str> = (names.iter())
        .filter_map(|name| Some(name.split_once('/')?.0))
        .collect();
    assert_eq!(settings.len(), 10);
    let mut count = Count::default();
    for name in settings {
        let setting = Setting::new(name);
        let out = folder.path().join(name);
        quantize(&setting, &out);
        let file = SafetensorsFile::open(&out.join("model.safetensors")).unwrap();
        let config = std::fs::read_to_string(out.join("quantize_config.json")).unwrap();
        let config = QuantizeConfig::from_quantize_config(&config).unwrap();
        let before = count.other_outputs;
        for stage in STAGES {
            if count.other_outputs > before {
                break;
            }
            for linear in stage {
                let layer = format!("model.layers.0.{linear}");
                if names.contains(&format!("{name}/{layer}.codes")) {
                    let info = |suffix| &file.tensors()[&format!("{layer}.{suffix}")].shape;
                    let shape = [info("g_idx")[0], info("scales")[1]];
                    let named = LayerName(layer.clone());
                    let got = read_layer(&file, &named, shape, &config).unwrap();
                    count.add(&golden, &setting, &layer, &got);
                }
            }
        }
    }
    eprintln!("{count:?}");
    assert!(count.codes > LEAST_CODES_COMPARED, "{count:?}");
    let most = count.outputs / OUTPUTS_OF_ONE_THAT_DIFFERS;
    assert!(count.other_outputs <= most, "{count:?}");
}

/// The golden is a file of windows too.
fn quantize(setting: &Setting, out: &Path) {
    let mut command = gptq("quantize");
    command.arg(fixture("verne")).arg("--out").arg(out);
    command.arg("--dataset").arg(fixture("witness.safetensors"));
    command.args(["--device", "cpu", "--effort", "fast"]);
    run(command.args(setting.flags())).done();
}
