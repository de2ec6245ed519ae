//! Weights that were read once: every value is finite, and it is known which weights they are.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use gptq_model::Device;
use gptq_types::{ContentHash, SourceError, TensorInfo, TensorSource, model_identity};
use rayon::ThreadPool;
use rayon::iter::{ParallelBridge, ParallelIterator};

/// The weights of a model, after [`check_weights`].
#[derive(Clone, Debug, PartialEq)]
pub struct CheckedWeights {
    /// By which a journal, a record or a repository knows them again.
    pub identity: ContentHash,
}

/// [`check_weights`] running in the background, or its result. Clones share one check.
#[derive(Clone)]
pub struct WeightCheck(Arc<Check>);

type Outcome = Result<CheckedWeights, Arc<SourceError>>;

struct Check {
    outcome: OnceLock<Outcome>,
    running: Mutex<Option<JoinHandle<Outcome>>>,
}

impl WeightCheck {
    /// Begins to read, on a thread of its own that hands the work to rayon's.
    pub fn begin(source: Arc<dyn TensorSource>, device: Device) -> Self {
        let check = move || check_weights(source.as_ref()).map_err(Arc::new);
        let running = thread::spawn(move || match own_threads(device) {
            Some(threads) => threads.install(check),
            None => check(),
        });
        WeightCheck(Arc::new(Check {
            outcome: OnceLock::new(),
            running: Mutex::new(Some(running)),
        }))
    }

    /// One that was done before.
    pub fn done(checked: CheckedWeights) -> Self {
        WeightCheck(Arc::new(Check {
            outcome: OnceLock::from(Ok(checked)),
            running: Mutex::new(None),
        }))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The result of [`check_weights`], for everyone who waits.
    pub fn wait(&self) -> Outcome {
        let end = || {
            let mut running = self
                .0
                .running
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let running = running.take().expect("one that is not done runs");
            running.join().unwrap_or_else(|panic| resume_unwind(panic))
        };
        self.0.outcome.get_or_init(end).clone()
    }
}

/// A pool of half the threads for a check concurrent with GPU work, so that tasks the GPU waits for do not
/// queue behind tensors. On a CPU, where nothing else runs yet, `None`: the global pool.
fn own_threads(device: Device) -> Option<ThreadPool> {
    match device {
        Device::Cpu => None,
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => {
            let half = rayon::current_num_threads().div_ceil(2);
            let threads = rayon::ThreadPoolBuilder::new().num_threads(half).build();
            threads.ok()
        }
    }
}

/// Reads every tensor once, on all threads: refuses the first one, in the order of names, with a
/// value that is not finite (better now than in the last block), and hashes all of them.
///
/// A thread takes a tensor at a time, the largest first, so that no long chain of hashing is left
/// to the end; it keeps 4 MB.
pub fn check_weights(source: &dyn TensorSource) -> Result<CheckedWeights, SourceError> {
    let mut tensors: Vec<(String, TensorInfo)> = Vec::new();
    for name in source.names() {
        let info = source.require(&name)?;
        tensors.push((name, info));
    }
    tensors.sort_by_key(|(_, info)| Reverse(info.bytes()));
    let hashed: BTreeMap<_, _> = (tensors.into_iter().par_bridge())
        .map(|(name, info)| {
            let hash = gptq_model::hash_checked(source, &name);
            (name, hash.map(|hash| (info, hash)))
        })
        .collect();
    let hashed = (hashed.into_iter())
        .map(|(name, found)| Ok((name, found?)))
        .collect::<Result<BTreeMap<_, _>, SourceError>>()?;
    Ok(CheckedWeights {
        identity: model_identity(&hashed),
    })
}

#[cfg(test)]
mod tests {
    use gptq_types::Dtype;

    use super::*;

    struct Tensors(BTreeMap<String, Vec<f32>>);

    impl TensorSource for Tensors {
        fn place(&self) -> String {
            "memory".to_string()
        }
        fn names(&self) -> Vec<String> {
            self.0.keys().cloned().collect()
        }
        fn info(&self, name: &str) -> Option<TensorInfo> {
            let shape = vec![self.0.get(name)?.len()];
            let dtype = Dtype::F32;
            Some(TensorInfo { dtype, shape })
        }
        fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
            Ok(self.0[name].iter().flat_map(|x| x.to_le_bytes()).collect())
        }
    }

    fn tensors(third: f32) -> Tensors {
        let values = |index: u16| vec![f32::from(index); 1 + usize::from(index)];
        let mut tensors: BTreeMap<String, Vec<f32>> = (0..40)
            .map(|index| (format!("t{index:02}"), values(index)))
            .collect();
        tensors.insert("t03".to_string(), vec![third; 7]);
        Tensors(tensors)
    }

    #[test]
    fn the_identity_is_that_of_the_tensors_and_the_first_bad_name_is_reported() {
        let source = tensors(0.5);
        let expected: BTreeMap<_, _> = (source.names().into_iter())
            .map(|name| {
                let info = source.info(&name).unwrap();
                let hash = ContentHash::of(&source.bytes(&name).unwrap());
                (name, (info, hash))
            })
            .collect();
        let found = check_weights(&source).unwrap().identity;
        assert_eq!(found, model_identity(&expected));
        assert_ne!(found, check_weights(&tensors(0.25)).unwrap().identity);
        let beside = WeightCheck::begin(Arc::new(tensors(0.5)), Device::Cpu);
        let waiting = beside.clone();
        let waited = thread::spawn(move || waiting.wait().unwrap());
        assert_eq!(beside.wait().unwrap().identity, found);
        assert_eq!(waited.join().unwrap().identity, found);

        let mut bad = tensors(f32::INFINITY);
        bad.0.insert("t39".to_string(), vec![f32::NAN]);
        let check = WeightCheck::begin(Arc::new(bad), Device::Cpu);
        for _ in 0..2 {
            let error = check.wait().unwrap_err().to_string();
            assert_eq!(error, "tensor `t03` in memory holds inf at element 0");
        }
    }
}
