//! Where the tensors of a decoder lie in a checkpoint.

use std::collections::HashSet;

use gptq_types::LayerName;

use crate::spec::LinearSpec;

/// The end of the embedding's name.
const EMBEDDING: &str = "embed_tokens.weight";
/// Prefixes that transformers writes, alone and inside a multimodal model.
const DECODER: &str = "model.";
const INSIDE: &str = "model.language_model.";

/// Names of a decoder's tensors.
#[derive(Clone)]
pub(crate) struct Paths {
    /// Before the embedding's name and those of blocks: `model.`.
    decoder: String,
    head: String,
    names: HashSet<String>,
}

impl Paths {
    /// As the names of a checkpoint's tensors have it; without any, as transformers writes them.
    pub fn of(names: &[String], inside: bool) -> Self {
        let usual = if inside { INSIDE } else { DECODER };
        let found = names.iter().filter_map(|name| {
            let prefix = name.strip_suffix(EMBEDDING)?;
            let block = format!("{prefix}layers.0.");
            names
                .iter()
                .any(|name| name.starts_with(&block))
                .then_some(prefix)
        });
        let decoder = found.min_by_key(|prefix| prefix.len()).unwrap_or(usual);
        // Beside the decoder, or inside the module that holds it; a head elsewhere is another model's.
        let decoder = decoder.to_string();
        let around: Vec<&str> = (decoder.match_indices('.'))
            .map(|(at, _)| &decoder[..=at])
            .chain([""])
            .collect();
        let is_head = |name: &&String| {
            let before = name.strip_suffix("lm_head.weight");
            before.is_some_and(|before| around.contains(&before))
        };
        // The innermost of several.
        let head = names.iter().filter(is_head).max_by_key(|name| name.len());
        Paths {
            head: head.map_or("lm_head.weight".to_string(), String::clone),
            decoder,
            names: names.iter().cloned().collect(),
        }
    }

    /// A tensor of the decoder outside of blocks.
    pub fn outer(&self, name: &str) -> String {
        format!("{}{name}", self.decoder)
    }

    /// The head where it is a tensor of its own.
    pub fn head(&self) -> String {
        self.head.clone()
    }

    /// A tensor of block `index`.
    pub fn block(&self, index: usize, name: &str) -> String {
        format!("{}layers.{index}.{name}", self.decoder)
    }

    /// Whether block `index` has a module of this name, quantized or not; no where no names are known.
    pub fn has(&self, index: usize, module: &str) -> bool {
        ["weight", "qweight"]
            .iter()
            .any(|tensor| (self.names).contains(&self.block(index, &format!("{module}.{tensor}"))))
    }

    /// Whether block `index` has this tensor; yes where no names are known.
    pub fn has_tensor(&self, index: usize, name: &str) -> bool {
        self.names.is_empty() || self.names.contains(&self.block(index, name))
    }

    /// A linear of block `index` that is quantized.
    pub fn linear(
        &self,
        index: usize,
        name: &str,
        [in_features, out_features]: [usize; 2],
        bias: bool,
    ) -> LinearSpec {
        LinearSpec {
            name: LayerName(self.block(index, name)),
            in_features,
            out_features,
            bias,
            quantized: true,
        }
    }
}
