//! Packing, writing and reading back: on a separate thread for a GPU, inline for a CPU.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use gptq_model::Device;
use gptq_packer::{PackedLayer, StagedCheckpoint, pack, verify_layer};
use gptq_quantizer::PendingLayer;
use gptq_types::{
    CheckpointFormat, ContentHash, LayerName, Phase, PhaseTimes, SolvedLayer, TensorSource,
};
use serde_json::{Map, Value};

use crate::journal::{BlockEntry, Journal};
use crate::resume::of_weights;
use crate::weights::WeightCheck;
use crate::{Job, PipelineError};

/// Queue length of the thread; most messages are linears. A capture group sends a burst, five in a Cohere;
/// seven are a whole block of a Llama, so solving continues while one is written. Each message holds the
/// codes of a linear in host memory, and a longer queue would wait for the same disk.
const WAITING: usize = 7;

/// A message to the writer thread, in order.
pub enum Message {
    Layer(LayerName, PendingLayer),
    Block(BlockEntry),
    Plain(Vec<String>),
    /// A bias, element `n` of which is what was the one at `outputs[n]`.
    Permuted(String, Option<Vec<u32>>),
}

/// The receiver of finished work.
pub enum Writer<'a> {
    /// Written before the call returns. On the processor a thread would compete with solving, and
    /// buffers that one thread allocates and another frees make memory grow with the blocks.
    Here(RefCell<Writing<'a>>),
    /// Queued for a thread.
    Beside {
        sender: SyncSender<Message>,
        trouble: &'a Mutex<Option<PipelineError>>,
    },
}

/// Takes finished work. Each call fails with what went wrong before, if anything did.
pub trait Output {
    /// Hands a message over.
    fn send(&self, message: Message) -> Result<(), PipelineError>;

    /// Hands a linear over.
    fn store(&self, layer: LayerName, solved: PendingLayer) -> Result<(), PipelineError> {
        self.send(Message::Layer(layer, solved))
    }

    /// Says that a block is complete: it is synced, then put into the journal.
    fn end_block(&self, entry: BlockEntry) -> Result<(), PipelineError> {
        self.send(Message::Block(entry))
    }

    /// Hands over the names of tensors that are copied as they are.
    fn copy(&self, names: &[String]) -> Result<(), PipelineError> {
        self.send(Message::Plain(names.to_vec()))
    }

    /// Hands over the name of a bias, to be copied in the order of the outputs; of none where the model has
    /// no such tensor.
    fn copy_permuted(&self, name: String, outputs: Option<Vec<u32>>) -> Result<(), PipelineError> {
        self.send(Message::Permuted(name, outputs))
    }
}

impl Output for Writer<'_> {
    fn send(&self, message: Message) -> Result<(), PipelineError> {
        match self {
            Writer::Here(writing) => writing.borrow_mut().take(message),
            Writer::Beside { sender, trouble } => {
                let gone = sender.send(message).is_err();
                match trouble.lock().expect("nobody panics with it").take() {
                    Some(error) => Err(error),
                    None if gone => unreachable!("the writer leaves early only with an error"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Runs `work` with a writer for it; all is on disk when it returns.
pub fn writing<R>(
    staged: &StagedCheckpoint,
    job: &Job,
    settings: &Map<String, Value>,
    journal: Option<Journal>,
    times: &mut PhaseTimes,
    work: impl FnOnce(&Writer<'_>, &mut PhaseTimes) -> Result<R, PipelineError>,
) -> Result<R, PipelineError> {
    std::thread::scope(|scope| {
        let (hash_ahead, blocks) = sync_channel(1);
        scope.spawn(move || hash_as_blocks_end(staged, &blocks));
        let writing = Writing {
            format: job.spec.format,
            source: job.source.as_ref(),
            check: &job.check,
            staged,
            settings,
            journal,
            tensors: BTreeMap::new(),
            hash_ahead,
            times: PhaseTimes::default(),
        };
        with_writer(writing, job.device.device(), times, work)
    })
}

/// The files' hashes go into the record; most of them is known when the last block ends.
fn hash_as_blocks_end(staged: &StagedCheckpoint, blocks: &Receiver<()>) {
    // A file that cannot be read here is read again at the end, which reports the error.
    while blocks.recv().is_ok() && staged.hash_ahead().is_ok() {}
}

fn with_writer<'a, R>(
    writing: Writing<'a>,
    device: Device,
    times: &mut PhaseTimes,
    work: impl FnOnce(&Writer<'_>, &mut PhaseTimes) -> Result<R, PipelineError>,
) -> Result<R, PipelineError> {
    let (result, writing) = match device {
        Device::Cpu => {
            let writer = Writer::Here(RefCell::new(writing));
            let result = work(&writer, times);
            let Writer::Here(writing) = writer else {
                unreachable!("it was made a line above");
            };
            (result, writing.into_inner())
        }
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => beside(writing, times, work),
    };
    for (phase, seconds) in &writing.times.seconds {
        *times.seconds.entry(*phase).or_default() += seconds;
    }
    result
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
fn beside<'a, R>(
    writing: Writing<'a>,
    times: &mut PhaseTimes,
    work: impl FnOnce(&Writer<'_>, &mut PhaseTimes) -> Result<R, PipelineError>,
) -> (Result<R, PipelineError>, Writing<'a>) {
    let (sender, receiver) = sync_channel(WAITING);
    let trouble = Mutex::new(None);
    let (result, writing) = std::thread::scope(|scope| {
        let trouble = &trouble;
        let thread = scope.spawn(move || writing.run(receiver, trouble));
        let writer = Writer::Beside { sender, trouble };
        let result = work(&writer, times);
        drop(writer);
        (result, thread.join().expect("the writer does not panic"))
    });
    let left = trouble.into_inner().expect("nobody panics with it");
    (result.and_then(|done| left.map_or(Ok(done), Err)), writing)
}

/// The files and what is known about them.
pub struct Writing<'a> {
    format: CheckpointFormat,
    source: &'a dyn TensorSource,
    check: &'a WeightCheck,
    staged: &'a StagedCheckpoint,
    settings: &'a Map<String, Value>,
    /// From the first block on.
    journal: Option<Journal>,
    /// Hashes of the current block's tensors, as they were written.
    tensors: BTreeMap<String, ContentHash>,
    /// Tells that a block ended.
    hash_ahead: SyncSender<()>,
    times: PhaseTimes,
}

impl Writing<'_> {
    fn run(mut self, receiver: Receiver<Message>, trouble: &Mutex<Option<PipelineError>>) -> Self {
        for message in receiver {
            if let Err(error) = self.take(message) {
                *trouble.lock().expect("nobody panics with it") = Some(error);
                break;
            }
        }
        self
    }

    fn take(&mut self, message: Message) -> Result<(), PipelineError> {
        match message {
            Message::Layer(layer, solved) => {
                let solved = solved().map_err(|source| PipelineError::Quantize {
                    layer: layer.clone(),
                    source,
                })?;
                self.store(&layer, &solved)
            }
            Message::Block(entry) => self.end_block(entry),
            Message::Plain(names) => self.copy(&names),
            Message::Permuted(name, outputs) => self.copy_permuted(&name, outputs.as_deref()),
        }
    }

    /// Packs, writes, and reads back what was written.
    fn store(&mut self, layer: &LayerName, solved: &SolvedLayer) -> Result<(), PipelineError> {
        let format = self.format;
        let packed = self
            .times
            .time(Phase::Pack, || pack(solved, format))
            .map_err(|source| PipelineError::Pack {
                layer: layer.clone(),
                source,
            })?;
        // One thread hashes while the others write and read back: the longer work by far.
        let (tensors, stored) = rayon::join(
            || hashes(&packed.tensors(layer)),
            || self.write_and_verify(layer, solved, &packed),
        );
        self.tensors.extend(tensors);
        stored
    }

    fn write_and_verify(
        &mut self,
        layer: &LayerName,
        solved: &SolvedLayer,
        packed: &PackedLayer,
    ) -> Result<(), PipelineError> {
        let start = Instant::now();
        for (name, bytes) in packed.tensors(layer) {
            self.staged.write(&name, bytes)?;
        }
        self.times.add(Phase::Write, start.elapsed());
        let format = self.format;
        self.times
            .time(Phase::Verify, || {
                verify_layer(self.staged, layer, solved, format)
            })
            .map_err(|source| PipelineError::Verify {
                layer: layer.clone(),
                source,
            })
    }

    fn copy(&mut self, names: &[String]) -> Result<(), PipelineError> {
        let start = Instant::now();
        for name in names {
            self.staged.write(name, &self.source.bytes(name)?)?;
        }
        self.times.add(Phase::Write, start.elapsed());
        Ok(())
    }

    fn copy_permuted(&mut self, name: &str, outputs: Option<&[u32]>) -> Result<(), PipelineError> {
        if self.source.info(name).is_none() {
            return Ok(());
        }
        let mut bytes = self.source.bytes(name)?;
        if let Some(outputs) = outputs {
            let width = bytes.len() / outputs.len();
            let elements = outputs
                .iter()
                .map(|&at| &bytes[at as usize * width..][..width]);
            bytes = elements.collect::<Vec<_>>().concat();
        }
        Ok(self.staged.write(name, &bytes)?)
    }

    fn end_block(&mut self, mut entry: BlockEntry) -> Result<(), PipelineError> {
        // A thread that is still at the block before hears of this one at the next.
        let _ = self.hash_ahead.try_send(());
        self.times.time(Phase::Write, || self.staged.sync())?;
        entry.tensors = std::mem::take(&mut self.tensors);
        self.journal()?.record(&entry)
    }

    /// Begins with the first block that it vouches for: by then it is known of which weights.
    fn journal(&mut self) -> Result<&mut Journal, PipelineError> {
        let journal = match self.journal.take() {
            Some(journal) => journal,
            None => {
                let settings = of_weights(self.settings, self.check)?;
                Journal::begin(self.staged.partial_dir(), &settings)?
            }
        };
        Ok(self.journal.insert(journal))
    }
}

fn hashes(tensors: &[(String, &[u8])]) -> BTreeMap<String, ContentHash> {
    (tensors.iter())
        .map(|(name, bytes)| (name.clone(), ContentHash::of(bytes)))
        .collect()
}
