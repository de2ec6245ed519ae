//! The decoders that can be imported, and what is peculiar to each.

use crate::HalfType;

/// A decoder that can be imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Architecture {
    /// Llama and Mistral.
    Llama,
    Qwen2,
    Qwen3,
    /// The text model of Gemma 3.
    Gemma3,
    /// Phi-3, Phi-3.5 and Phi-4.
    Phi3,
    /// GLM-4-0414 without experts.
    Glm4,
}

impl Architecture {
    pub(crate) const ALL: [Architecture; 6] = [
        Architecture::Llama,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Gemma3,
        Architecture::Phi3,
        Architecture::Glm4,
    ];

    /// The prefix of its keys.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Gemma3 => "gemma3",
            Architecture::Phi3 => "phi3",
            Architecture::Glm4 => "glm4",
        }
    }

    /// The `model_type` of its config.json.
    pub(crate) fn model_type(self) -> &'static str {
        match self {
            Architecture::Gemma3 => "gemma3_text",
            other => other.name(),
        }
    }

    pub(crate) fn class(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Gemma3 => "Gemma3ForCausalLM",
            Architecture::Phi3 => "Phi3ForCausalLM",
            Architecture::Glm4 => "Glm4ForCausalLM",
        }
    }

    /// The type of its written tensors, declared for readers to compute in. Activations of Gemma 3
    /// overflow f16: those of the 270M model reach 66128 within 1024 tokens of WikiText-2.
    pub(crate) fn half(self) -> HalfType {
        match self {
            Architecture::Gemma3 => HalfType::Bf16,
            _ => HalfType::F16,
        }
    }

    /// Keys below its name that mean something for it alone.
    pub(crate) fn own_keys(self) -> &'static [&'static str] {
        match self {
            Architecture::Gemma3 => &[
                "attention.sliding_window",
                "attention.sliding_window_pattern",
                "final_logit_softcapping",
                "rope.freq_base_swa",
            ],
            Architecture::Phi3 => &["attention.sliding_window", "rope.scaling.attn_factor"],
            _ => &[],
        }
    }

    /// Whether RoPE may rotate only a part of each head.
    pub(crate) fn turns_a_part(self) -> bool {
        matches!(self, Architecture::Phi3 | Architecture::Glm4)
    }

    /// The offset that the converter added to norm weights: Gemma 3 multiplies by `1 + w`.
    pub(crate) fn added_to_norms(self) -> f32 {
        match self {
            Architecture::Gemma3 => 1.0,
            _ => 0.0,
        }
    }
}
