//! The readers: for each the file to mutate, the files that accompany it, and the commands that read it.

/// The kind of mutation for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Raw bytes.
    Bytes,
    /// JSON, TOML, lines of them.
    Text,
    /// A chat or card template.
    Template,
    /// JSON with a chat template inside.
    TokenizerConfig,
    /// A length, a JSON header, data.
    Safetensors,
    /// GGUF.
    Gguf,
    /// A SentencePiece model.
    Protobuf,
    /// A git tree.
    Tree,
}

/// The place of a mutated file, possibly inside a git repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The path `file` itself.
    File,
    /// The tree of the branch.
    Tree,
    /// This file of the branch.
    Blob(&'static str),
    /// The loose object of the branch's commit.
    Commit,
    /// The branch's weights in the LFS store.
    Stored,
}

/// A reader.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Folders and files of the seeds that lie in the run's folder, with their names there.
    pub beside: &'static [(&'static str, &'static str)],
    /// The seeds that are changed.
    pub seeds: &'static [&'static str],
    /// The name of the changed file in the run's folder; the seed's own end (`.gz`, `.arrow`) takes
    /// the place of `*`.
    pub file: &'static str,
    /// The kind of mutation.
    pub kind: Kind,
    /// The place of the mutated file.
    pub place: Place,
    /// Command lines; a run takes one of them. `*` is as in `file`.
    pub commands: &'static [&'static str],
    /// Files that must not exist after an error.
    pub absent: &'static [&'static str],
    /// Whether every change must be detected.
    pub hashed: bool,
}

const PLAIN: Target = Target {
    name: "",
    beside: &[],
    seeds: &[],
    file: "",
    kind: Kind::Bytes,
    place: Place::File,
    commands: &[],
    absent: &["out", ".out.partial"],
    hashed: false,
};

const MODEL: &[(&str, &str)] = &[("model", "model")];
const PACKED: &[(&str, &str)] = &[("packed", "packed")];
const REPOSITORY: &[(&str, &str)] = &[
    ("repo", "repo"),
    ("model", "model"),
    ("plan.toml", "plan.toml"),
    ("text.txt", "text.txt"),
];

const RTN: &str = "quantize model --out out --method rtn --group-size 32 --device cpu";
const WINDOWS: &str = "quantize model --out out --dataset rows* --samples 2 --seq-len 16 --group-size 32 --device cpu";
const EVAL: &str = "eval packed --dataset text.txt --max-windows 1 --seq-len 16 --device cpu";
const QUESTIONS: &str = "eval model --dataset text.txt --max-windows 1 --seq-len 16 --task q=questions.jsonl --task-examples 2 --device cpu";
const QUESTION_TABLES: &str = "eval model --dataset text.txt --max-windows 1 --seq-len 16 --task q=questions* --task-examples 2 --device cpu";
const LOGITS: &str = "verify packed --write logits.safetensors --ids 1,5,20";
const WRITE: &str = "generate model --prompt around --max-new-tokens 1 --device cpu";
const CHAT: &str = "generate model --chat --prompt around --max-new-tokens 1 --device cpu";
const PULL: &str = "pull repo:gptq-4bit-32g-actorder_False --out out";
const AGAIN: &str = "matrix model --plan plan.toml --out repo --dataset text.txt --samples 2 --seq-len 16 --evaluate text.txt --eval-seq-len 16 --eval-windows 1 --device cpu";

/// All readers.
pub const TARGETS: &[Target] = &[
    Target {
        name: "float-safetensors",
        beside: MODEL,
        seeds: &["model/model.safetensors"],
        file: "model/model.safetensors",
        kind: Kind::Safetensors,
        commands: &["inspect model", RTN],
        ..PLAIN
    },
    Target {
        name: "index",
        beside: &[("sharded", "model")],
        seeds: &["sharded/model.safetensors.index.json"],
        file: "model/model.safetensors.index.json",
        kind: Kind::Text,
        commands: &["inspect model", RTN],
        ..PLAIN
    },
    Target {
        name: "config",
        beside: &[("model", "model"), ("plan.toml", "plan.toml")],
        seeds: &[
            "model/config.json",
            "seeds/llama3.json",
            "seeds/mistral.json",
        ],
        file: "model/config.json",
        kind: Kind::Text,
        commands: &[
            "inspect model",
            RTN,
            "verify model --write logits.safetensors --ids 1,5,20",
            "generate model --prompt around --max-new-tokens 1 --device cpu",
            "matrix model --plan plan.toml --dry-run",
        ],
        ..PLAIN
    },
    Target {
        name: "packed-safetensors",
        beside: &[("packed", "packed"), ("text.txt", "text.txt")],
        seeds: &["packed/model.safetensors"],
        file: "packed/model.safetensors",
        kind: Kind::Safetensors,
        commands: &["inspect packed --layers", LOGITS, EVAL],
        ..PLAIN
    },
    Target {
        name: "packed-act-order",
        beside: &[("act", "packed"), ("text.txt", "text.txt")],
        seeds: &["act/model.safetensors"],
        file: "packed/model.safetensors",
        kind: Kind::Safetensors,
        commands: &[
            "inspect packed",
            LOGITS,
            EVAL,
            "generate packed --prompt around --max-new-tokens 1 --device cpu",
        ],
        ..PLAIN
    },
    Target {
        name: "packed-config",
        beside: &[("act", "packed"), ("text.txt", "text.txt")],
        seeds: &["act/config.json"],
        file: "packed/config.json",
        kind: Kind::Text,
        commands: &["inspect packed", LOGITS, EVAL],
        ..PLAIN
    },
    Target {
        name: "quantize-config",
        beside: &[("v1", "packed"), ("text.txt", "text.txt")],
        seeds: &["v1/quantize_config.json"],
        file: "packed/quantize_config.json",
        kind: Kind::Text,
        commands: &["inspect packed", LOGITS, EVAL],
        ..PLAIN
    },
    Target {
        name: "tokenizer",
        beside: MODEL,
        seeds: &[
            "model/tokenizer.json",
            "seeds/unigram.json",
            "seeds/wordpiece.json",
        ],
        file: "model/tokenizer.json",
        kind: Kind::Text,
        commands: &[WRITE, CHAT],
        ..PLAIN
    },
    Target {
        name: "tokenizer-model",
        beside: &[("bare", "model")],
        seeds: &["tokenizer.model", "unigram.model"],
        file: "model/tokenizer.model",
        kind: Kind::Protobuf,
        commands: &[WRITE],
        ..PLAIN
    },
    Target {
        name: "tokenizer-config",
        beside: MODEL,
        seeds: &["model/tokenizer_config.json"],
        file: "model/tokenizer_config.json",
        kind: Kind::TokenizerConfig,
        commands: &[CHAT, RTN],
        ..PLAIN
    },
    Target {
        name: "special-tokens-map",
        beside: MODEL,
        seeds: &["model/special_tokens_map.json"],
        file: "model/special_tokens_map.json",
        kind: Kind::Text,
        commands: &[CHAT],
        ..PLAIN
    },
    Target {
        name: "generation-config",
        beside: MODEL,
        seeds: &["model/generation_config.json"],
        file: "model/generation_config.json",
        kind: Kind::Text,
        commands: &[CHAT, RTN],
        ..PLAIN
    },
    Target {
        name: "chat-template",
        beside: MODEL,
        seeds: &["seeds/chat_template.jinja", "seeds/tools.jinja"],
        file: "model/chat_template.jinja",
        kind: Kind::Template,
        commands: &[CHAT],
        ..PLAIN
    },
    Target {
        name: "card-template",
        beside: PACKED,
        seeds: &["seeds/card.jinja"],
        file: "card.jinja",
        kind: Kind::Template,
        commands: &["card packed --template card.jinja"],
        ..PLAIN
    },
    Target {
        name: "card-details",
        beside: PACKED,
        seeds: &["seeds/card.toml"],
        file: "card.toml",
        kind: Kind::Text,
        commands: &["card packed --card card.toml"],
        ..PLAIN
    },
    Target {
        name: "gguf",
        seeds: &["llama.gguf", "gpt2.gguf"],
        file: "model.gguf",
        kind: Kind::Gguf,
        commands: &["import model.gguf --out out"],
        ..PLAIN
    },
    Target {
        name: "parquet",
        beside: MODEL,
        seeds: &[
            "seeds/rows.parquet",
            "seeds/rows-plain.parquet",
            "seeds/rows-chats.parquet",
        ],
        file: "rows*",
        commands: &[WINDOWS],
        ..PLAIN
    },
    Target {
        name: "arrow",
        beside: MODEL,
        seeds: &[
            "seeds/rows.arrow",
            "seeds/rows-lz4.arrow",
            "seeds/rows-zstd.arrow",
            "seeds/rows-stream.arrow",
        ],
        file: "rows*",
        commands: &[WINDOWS],
        ..PLAIN
    },
    Target {
        name: "rows",
        beside: MODEL,
        seeds: &[
            "seeds/rows.jsonl",
            "seeds/rows.json",
            "seeds/strings.json",
            "seeds/chats.jsonl",
            "seeds/sharegpt.jsonl",
            "seeds/instructions.jsonl",
        ],
        file: "rows*",
        kind: Kind::Text,
        commands: &[
            WINDOWS,
            "eval model --dataset rows* --max-windows 1 --seq-len 16 --device cpu",
        ],
        ..PLAIN
    },
    Target {
        name: "text",
        beside: MODEL,
        seeds: &["seeds/rows.txt.gz", "seeds/rows.txt.zst", "text.txt"],
        file: "rows*",
        commands: &[WINDOWS],
        ..PLAIN
    },
    Target {
        name: "last-words",
        beside: &[("model", "model"), ("text.txt", "text.txt")],
        seeds: &["seeds/rows.jsonl"],
        file: "passages.jsonl",
        kind: Kind::Text,
        commands: &[
            "eval model --dataset text.txt --max-windows 1 --seq-len 16 --lambada passages.jsonl --lambada-examples 2 --device cpu",
        ],
        ..PLAIN
    },
    Target {
        name: "questions",
        beside: &[("model", "model"), ("text.txt", "text.txt")],
        seeds: &[
            "seeds/arc.jsonl",
            "seeds/piqa.jsonl",
            "seeds/winogrande.jsonl",
            "seeds/hellaswag.jsonl",
        ],
        file: "questions.jsonl",
        kind: Kind::Text,
        commands: &[QUESTIONS],
        ..PLAIN
    },
    Target {
        name: "question-tables",
        beside: &[("model", "model"), ("text.txt", "text.txt")],
        seeds: &["seeds/questions.parquet", "seeds/questions.arrow"],
        file: "questions*",
        commands: &[QUESTION_TABLES],
        ..PLAIN
    },
    Target {
        name: "windows",
        beside: MODEL,
        seeds: &["rows.safetensors"],
        file: "rows*",
        kind: Kind::Safetensors,
        commands: &[
            WINDOWS,
            "eval model --dataset rows* --max-windows 1 --seq-len 16 --device cpu",
        ],
        ..PLAIN
    },
    Target {
        name: "plan",
        beside: &[("model", "model"), ("text.txt", "text.txt")],
        seeds: &["plan.toml", "seeds/plan.toml"],
        file: "plan.toml",
        kind: Kind::Text,
        commands: &[
            "matrix model --plan plan.toml --dry-run",
            "matrix model --plan plan.toml --dry-run --json",
        ],
        ..PLAIN
    },
    Target {
        name: "journal",
        beside: &[
            ("partial", ".out.partial"),
            ("model", "model"),
            ("text.txt", "text.txt"),
        ],
        seeds: &["partial/journal.jsonl"],
        file: ".out.partial/journal.jsonl",
        kind: Kind::Text,
        commands: &[
            "quantize model --out out --resume --dataset text.txt --samples 16 --seq-len 64 --group-size 32 --device cpu",
        ],
        absent: &["out"],
        ..PLAIN
    },
    Target {
        name: "partial-tensors",
        beside: &[
            ("partial", ".out.partial"),
            ("model", "model"),
            ("text.txt", "text.txt"),
        ],
        seeds: &["partial/model.safetensors"],
        file: ".out.partial/model.safetensors",
        kind: Kind::Safetensors,
        commands: &[
            "quantize model --out out --resume --dataset text.txt --samples 16 --seq-len 64 --group-size 32 --device cpu",
        ],
        absent: &["out"],
        ..PLAIN
    },
    Target {
        name: "state",
        beside: &[
            ("model", "model"),
            ("packed", "packed"),
            ("text.txt", "text.txt"),
            ("seeds/piqa.jsonl", "piqa.jsonl"),
        ],
        seeds: &["state.jsonl"],
        file: "state.jsonl",
        kind: Kind::Text,
        commands: &[
            "eval model packed --dataset text.txt --max-windows 2 --seq-len 16 --task q=piqa.jsonl --state state.jsonl --device cpu",
        ],
        ..PLAIN
    },
    Target {
        name: "run-record",
        beside: PACKED,
        seeds: &["packed/gptq_run.json"],
        file: "packed/gptq_run.json",
        kind: Kind::Text,
        commands: &[
            "card packed",
            "report packed --out out",
            "report packed/gptq_run.json --out out",
            "verify packed",
        ],
        ..PLAIN
    },
    Target {
        name: "vouched-weights",
        beside: PACKED,
        seeds: &["packed/model.safetensors"],
        file: "packed/model.safetensors",
        kind: Kind::Safetensors,
        commands: &["verify packed"],
        hashed: true,
        ..PLAIN
    },
    Target {
        name: "vouched-config",
        beside: PACKED,
        seeds: &["packed/quantize_config.json"],
        file: "packed/quantize_config.json",
        kind: Kind::Text,
        commands: &["verify packed"],
        hashed: true,
        ..PLAIN
    },
    Target {
        name: "eval-record",
        beside: PACKED,
        seeds: &["eval.json"],
        file: "eval.json",
        kind: Kind::Text,
        commands: &[
            "report packed eval.json --out out",
            "report eval.json --out out --json",
        ],
        ..PLAIN
    },
    Target {
        name: "expected-logits",
        beside: PACKED,
        seeds: &["logits.safetensors"],
        file: "expected.safetensors",
        kind: Kind::Safetensors,
        commands: &["verify packed --expect expected.safetensors"],
        ..PLAIN
    },
    Target {
        name: "baseline",
        beside: &[
            ("model", "model"),
            ("packed", "packed"),
            ("text.txt", "text.txt"),
        ],
        seeds: &["baseline.json"],
        file: "baseline.json",
        kind: Kind::Text,
        commands: &["regress --baseline baseline.json --checkpoint packed"],
        ..PLAIN
    },
    Target {
        name: "matrix-state",
        beside: REPOSITORY,
        seeds: &["repo/gptq/matrix.json"],
        file: "repo/gptq/matrix.json",
        kind: Kind::Text,
        commands: &[AGAIN, "card repo", "report repo --out out"],
        ..PLAIN
    },
    Target {
        name: "full-record",
        beside: REPOSITORY,
        seeds: &["repo/gptq/records/gptq-4bit-32g-actorder_False.json"],
        file: "repo/gptq/records/gptq-4bit-32g-actorder_False.json",
        kind: Kind::Text,
        commands: &["card repo", "report repo --out out"],
        ..PLAIN
    },
    Target {
        name: "branch-record",
        beside: REPOSITORY,
        seeds: &["branch/gptq_branch.json"],
        file: "gptq_branch.json",
        kind: Kind::Text,
        place: Place::Blob("gptq_branch.json"),
        commands: &[AGAIN, "card repo", "report repo --out out"],
        ..PLAIN
    },
    Target {
        name: "branch-run-record",
        beside: REPOSITORY,
        seeds: &["branch/gptq_run.json"],
        file: "gptq_run.json",
        kind: Kind::Text,
        place: Place::Blob("gptq_run.json"),
        commands: &["card repo", "report repo --out out", PULL],
        ..PLAIN
    },
    Target {
        name: "tree",
        beside: REPOSITORY,
        seeds: &["branch.tree"],
        file: "branch.tree",
        kind: Kind::Tree,
        place: Place::Tree,
        commands: &[PULL, PULL, "card repo"],
        ..PLAIN
    },
    Target {
        name: "commit",
        beside: REPOSITORY,
        seeds: &["branch.commit"],
        file: "branch.commit",
        place: Place::Commit,
        commands: &[PULL],
        ..PLAIN
    },
    Target {
        name: "pointer",
        beside: REPOSITORY,
        seeds: &["branch.pointer"],
        file: "branch.pointer",
        kind: Kind::Text,
        place: Place::Blob("model.safetensors"),
        commands: &[PULL],
        ..PLAIN
    },
    Target {
        name: "git-config",
        beside: REPOSITORY,
        seeds: &["repo/config"],
        file: "repo/config",
        kind: Kind::Text,
        commands: &[PULL, "card repo", AGAIN],
        ..PLAIN
    },
    Target {
        name: "lfs-object",
        beside: REPOSITORY,
        seeds: &["branch/model.safetensors"],
        file: "repo/lfs/objects",
        kind: Kind::Safetensors,
        place: Place::Stored,
        commands: &[PULL],
        hashed: true,
        ..PLAIN
    },
];
