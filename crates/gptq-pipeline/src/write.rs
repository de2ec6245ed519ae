//! Packing, writing and reading back, on a thread beside the work on the next linears.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use gptq_model::Device;
use gptq_packer::{StagedCheckpoint, pack, verify_layer};
use gptq_types::{LayerName, Phase, PhaseTimes, QuantSpec, SolvedLayer, TensorSource};

use crate::journal::{BlockEntry, Journal};
use crate::{Job, PipelineError};

/// Linears that may wait: on a GPU as many as a block has, since the linears of a stage come in a
/// burst; on the processor none, where writing competes with solving anyway and memory counts.
fn waiting(device: Device) -> usize {
    match device {
        Device::Cpu => 0,
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => 7,
    }
}

enum Message {
    Layer(LayerName, Box<SolvedLayer>),
    Block(BlockEntry),
    Plain(Vec<String>),
}

/// The near end of the writing thread.
pub struct Writer<'a> {
    sender: SyncSender<Message>,
    trouble: &'a Mutex<Option<PipelineError>>,
}

impl Writer<'_> {
    /// Hands a linear over. Fails with what went wrong before, if anything did.
    pub fn store(&self, layer: LayerName, solved: SolvedLayer) -> Result<(), PipelineError> {
        self.send(Message::Layer(layer, Box::new(solved)))
    }

    /// Says that a block is complete: it is synced, then put into the journal.
    pub fn end_block(&self, entry: BlockEntry) -> Result<(), PipelineError> {
        self.send(Message::Block(entry))
    }

    /// Hands over the names of tensors that are copied as they are.
    pub fn copy(&self, names: &[String]) -> Result<(), PipelineError> {
        self.send(Message::Plain(names.to_vec()))
    }

    fn send(&self, message: Message) -> Result<(), PipelineError> {
        let gone = self.sender.send(message).is_err();
        match self.trouble.lock().expect("nobody panics with it").take() {
            Some(error) => Err(error),
            None if gone => unreachable!("the writer leaves early only with an error"),
            None => Ok(()),
        }
    }
}

/// Runs `work` with a writer beside it; returns the journal once all is on disk.
pub fn beside<R>(
    staged: &StagedCheckpoint,
    job: &Job,
    journal: Journal,
    times: &mut PhaseTimes,
    work: impl FnOnce(&Writer<'_>, &mut PhaseTimes) -> Result<R, PipelineError>,
) -> Result<(R, Journal), PipelineError> {
    let (sender, receiver) = sync_channel(waiting(job.device));
    let trouble = Mutex::new(None);
    std::thread::scope(|scope| {
        let writing = Writing {
            source: job.source.as_ref(),
            staged,
            spec: &job.spec,
            journal,
            times: PhaseTimes::default(),
        };
        let trouble = &trouble;
        let thread = scope.spawn(move || writing.run(receiver, trouble));
        let writer = Writer { sender, trouble };
        let result = work(&writer, times);
        drop(writer);
        let writing = thread.join().expect("the writer does not panic");
        // Beside the rest, so these seconds are not part of the sum of all phases.
        for (phase, seconds) in &writing.times.seconds {
            *times.seconds.entry(*phase).or_default() += seconds;
        }
        let result = result?;
        match trouble.lock().expect("nobody panics with it").take() {
            Some(error) => Err(error),
            None => Ok((result, writing.journal)),
        }
    })
}

/// The far end.
struct Writing<'a> {
    source: &'a dyn TensorSource,
    staged: &'a StagedCheckpoint,
    spec: &'a QuantSpec,
    journal: Journal,
    times: PhaseTimes,
}

impl Writing<'_> {
    fn run(mut self, receiver: Receiver<Message>, trouble: &Mutex<Option<PipelineError>>) -> Self {
        for message in receiver {
            let done = match message {
                Message::Layer(layer, solved) => self.store(&layer, &solved),
                Message::Block(entry) => self.end_block(&entry),
                Message::Plain(names) => self.copy(&names),
            };
            if let Err(error) = done {
                *trouble.lock().expect("nobody panics with it") = Some(error);
                break;
            }
        }
        self
    }

    /// Packs, writes, and reads back what was written.
    fn store(&mut self, layer: &LayerName, solved: &SolvedLayer) -> Result<(), PipelineError> {
        let format = self.spec.format;
        let packed = self
            .times
            .time(Phase::Pack, || pack(solved, format))
            .map_err(|source| PipelineError::Pack {
                layer: layer.clone(),
                source,
            })?;
        let start = Instant::now();
        for (name, bytes) in packed.tensors(layer) {
            self.staged.write(&name, bytes)?;
        }
        self.times.add(Phase::Write, start.elapsed());
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

    fn end_block(&mut self, entry: &BlockEntry) -> Result<(), PipelineError> {
        self.times.time(Phase::Write, || self.staged.sync())?;
        self.journal.record(entry)
    }
}
