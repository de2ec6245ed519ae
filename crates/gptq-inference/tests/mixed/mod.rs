//! A checkpoint in which some linears are packed and some are floats, as exclusion rules of other
//! tools leave them.

use std::path::Path;

use gptq_packer::SafetensorsFile;
use gptq_types::{SourceError, TensorInfo, TensorSource};

pub struct Mixed {
    packed: SafetensorsFile,
    float: SafetensorsFile,
}

impl Mixed {
    /// Float linears among packed ones: an input linear in one block, and `o_proj` in one block only.
    const FLOAT: [&str; 3] = [
        "model.layers.0.self_attn.o_proj.",
        "model.layers.1.self_attn.k_proj.",
        "model.layers.2.mlp.down_proj.",
    ];

    /// Opens two folders that hold the same model.
    pub fn open(packed: &Path, float: &Path) -> Self {
        let file = |dir: &Path| SafetensorsFile::open(&dir.join("model.safetensors")).unwrap();
        Mixed {
            packed: file(packed),
            float: file(float),
        }
    }

    fn holder(&self, name: &str) -> &SafetensorsFile {
        match Self::FLOAT.iter().any(|linear| name.starts_with(linear)) {
            true => &self.float,
            false => &self.packed,
        }
    }
}

impl TensorSource for Mixed {
    fn place(&self) -> String {
        self.packed.place()
    }

    fn names(&self) -> Vec<String> {
        let own = |file: &SafetensorsFile| -> Vec<String> {
            let here = |name: &String| std::ptr::eq(self.holder(name), file);
            file.names().into_iter().filter(here).collect()
        };
        [own(&self.packed), own(&self.float)].concat()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.holder(name).info(name)
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        self.holder(name).bytes(name)
    }
}
