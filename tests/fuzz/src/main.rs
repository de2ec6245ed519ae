//! Fuzz targets for everything that `gptq` reads: files are changed at random, the command reads
//! them as a user would have it do, and each run is judged. Exit 0, 1 or 2, no signal, at most ten
//! seconds and a gigabyte, one error line, no panic, nothing written elsewhere.
//!
//! It needs none of the project's crates; it needs `git`, and Linux.

mod binary;
mod bytes;
mod command;
mod judge;
mod layout;
mod outside;
mod random;
mod seeds;
mod table;
mod targets;
mod template;
mod text;
mod watch;
mod worker;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use command::Gptq;
use outside::OUTSIDE;
use table::Table;
use targets::{TARGETS, Target};
use worker::{Input, Verdict, Worker};

const USAGE: &str = "\
gptq-fuzz [--seed N] [--runs N] [--target NAME]... [--jobs N] [--kept DIR] [--command FILE]

  --seed N       Runs follow from it [default: 1]
  --runs N       Runs over all targets; 0 tries the corpus alone [default: 1000]
  --target NAME  Only this target; can be repeated
  --jobs N       Runs side by side [default: all processors]
  --kept DIR     Where inputs with a fault are kept [default: gptq-fuzz-kept below $TMPDIR]
  --command FILE The command [default: $GPTQ_COMMAND, else release/gptq below $CARGO_TARGET_DIR]
";

/// Inputs that are kept of one kind of fault of a target.
const KEPT_OF_A_KIND: usize = 3;

struct Options {
    seed: u64,
    runs: usize,
    targets: Vec<String>,
    jobs: usize,
    kept: PathBuf,
    command: PathBuf,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments
        .first()
        .is_some_and(|first| first == watch::SUBCOMMAND)
    {
        return watch::main(&arguments[1..]);
    }
    match options(&arguments).and_then(|options| fuzz(&options)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(reason) => {
            eprintln!("error: {reason}");
            ExitCode::from(2)
        }
    }
}

fn options(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options {
        seed: 1,
        runs: 1000,
        targets: Vec::new(),
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        kept: std::env::temp_dir().join("gptq-fuzz-kept"),
        command: built(),
    };
    let mut words = arguments.iter();
    while let Some(flag) = words.next() {
        let value = words.next().ok_or_else(|| USAGE.to_string())?;
        let number = || {
            value
                .parse::<u64>()
                .map_err(|error| format!("{flag} {value}: {error}"))
        };
        match flag.as_str() {
            "--seed" => options.seed = number()?,
            "--runs" => options.runs = number()? as usize,
            "--jobs" => options.jobs = number()?.clamp(1, 64) as usize,
            "--target" => options.targets.push(value.clone()),
            "--kept" => options.kept = PathBuf::from(value),
            "--command" => options.command = PathBuf::from(value),
            _ => return Err(USAGE.to_string()),
        }
    }
    Ok(options)
}

fn built() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"));
    let command = std::env::var_os("GPTQ_COMMAND").map(PathBuf::from);
    command.unwrap_or(target.join("release/gptq"))
}

/// Runs all that was asked for; how many runs had a fault.
fn fuzz(options: &Options) -> Result<usize, String> {
    let program = options.command.canonicalize();
    let program = program.map_err(|error| format!("{}: {error}", options.command.display()))?;
    let gptq = Gptq { program };
    let chosen = chosen(&options.targets)?;
    let scratch = std::env::temp_dir().join(format!("gptq-fuzz-{}", std::process::id()));
    let seeds = scratch.join("seeds");
    for folder in [&seeds, Path::new(OUTSIDE)] {
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    }
    let result = seeds::make(&gptq, &seeds).and_then(|()| {
        let mut inputs = sound(&chosen, &seeds)?;
        inputs.extend(corpus(&chosen)?);
        let kept = inputs.len();
        println!(
            "seeds and corpus: {kept} runs; random: {} runs, seed {}",
            options.runs, options.seed
        );
        let session = Session {
            gptq: &gptq,
            seeds: &seeds,
            scratch: &scratch,
            options,
            chosen: &chosen,
            inputs,
            next: AtomicUsize::new(0),
            found: Mutex::default(),
        };
        session.all()
    });
    let _ = fs::remove_dir_all(&scratch);
    result
}

fn chosen(names: &[String]) -> Result<Vec<&'static Target>, String> {
    let all = || TARGETS.iter().map(|target| target.name);
    if let Some(unknown) = names.iter().find(|name| !all().any(|known| known == *name)) {
        return Err(format!(
            "no target `{unknown}`; there are {}",
            all().collect::<Vec<_>>().join(", ")
        ));
    }
    let is_chosen =
        |target: &&Target| names.is_empty() || names.iter().any(|name| name == target.name);
    Ok(TARGETS.iter().filter(is_chosen).collect())
}

/// The seeds as they are, once for each command: what nobody can read tests little.
fn sound(chosen: &[&'static Target], seeds: &Path) -> Result<Vec<Input>, String> {
    let mut inputs = Vec::new();
    for &target in chosen {
        for (seed, line) in target
            .seeds
            .iter()
            .flat_map(|seed| target.commands.iter().map(move |line| (seed, line)))
        {
            inputs.push(Input::new(
                target,
                seed,
                seeds::read(&seeds.join(seed))?,
                false,
                line,
            ));
        }
    }
    Ok(inputs)
}

/// Inputs that once found something, with every command of their target: `corpus/TARGET/FILE`.
fn corpus(chosen: &[&'static Target]) -> Result<Vec<Input>, String> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut inputs = Vec::new();
    for &target in chosen {
        let files = fs::read_dir(corpus.join(target.name))
            .into_iter()
            .flatten()
            .flatten();
        let mut files: Vec<PathBuf> = files.map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            let name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let bytes = seeds::read(&file)?;
            inputs.extend(
                target
                    .commands
                    .iter()
                    .map(|line| Input::new(target, &name, bytes.clone(), true, line)),
            );
        }
    }
    Ok(inputs)
}

#[derive(Default)]
struct Found {
    table: Table,
    kinds: BTreeMap<String, usize>,
}

struct Session<'a> {
    gptq: &'a Gptq,
    seeds: &'a Path,
    scratch: &'a Path,
    options: &'a Options,
    chosen: &'a [&'static Target],
    inputs: Vec<Input>,
    next: AtomicUsize,
    found: Mutex<Found>,
}

impl Session<'_> {
    fn all(&self) -> Result<usize, String> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.options.jobs)
                .map(|number| scope.spawn(move || self.work(number)))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("a worker does not panic"))
        })?;
        let found = self.found.lock().expect("no worker panics");
        println!("{}", found.table.render());
        for (kind, count) in &found.kinds {
            println!("{count} x {kind}");
        }
        Ok(found.table.faults())
    }

    fn work(&self, number: usize) -> Result<(), String> {
        let mut worker = Worker::new(
            self.gptq,
            self.seeds,
            self.scratch.join(format!("worker-{number}")),
        )?;
        loop {
            let next = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((input, name)) = self.input(next)? else {
                return Ok(());
            };
            let verdict = worker.run(&input)?;
            self.note(&worker, &input, &name, &verdict)?;
        }
    }

    /// The input of this number: what is kept first, then the targets in turn.
    fn input(&self, number: usize) -> Result<Option<(Input, String)>, String> {
        if let Some(input) = self.inputs.get(number) {
            return Ok(Some((input.clone(), format!("kept-{number}"))));
        }
        let number = number - self.inputs.len();
        if number >= self.options.runs {
            return Ok(None);
        }
        let target = self.chosen[number % self.chosen.len()];
        let run = (number / self.chosen.len()) as u64;
        let seed = self.options.seed;
        let input = Input::drawn(target, self.seeds, seed, run)?;
        Ok(Some((input, format!("{seed}-{run}"))))
    }

    fn note(
        &self,
        worker: &Worker,
        input: &Input,
        name: &str,
        verdict: &Verdict,
    ) -> Result<(), String> {
        let target = input.target.name;
        if !input.changed && verdict.took.code != Some(0) {
            let said = verdict
                .stderr
                .lines()
                .find(|line| line.starts_with("error: "));
            let said = said.unwrap_or("no error line");
            println!("seed of {target}, `{}`: {said}", input.line);
        }
        let mut found = self.found.lock().expect("no worker panics");
        found.table.add(target, verdict);
        let Some(first) = verdict.faults.first() else {
            return Ok(());
        };
        let kind = first.split(':').next().unwrap_or(first);
        let place = verdict
            .stderr
            .split("panicked at ")
            .nth(1)
            .and_then(|rest| rest.lines().next());
        let kind = format!("{target}: {kind} {}", place.unwrap_or(""));
        let count = found.kinds.entry(kind).or_default();
        *count += 1;
        let many = *count > KEPT_OF_A_KIND;
        drop(found);
        if many {
            return Ok(());
        }
        let folder = self.options.kept.join(format!("{target}-{name}"));
        worker.lay_out(input, &folder.join("run"))?;
        seeds::write(&folder.join(format!("changed{}", input.end)), &input.bytes)?;
        let again = format!(
            "cd run && RAYON_NUM_THREADS=1 HF_HUB_OFFLINE=1 {} {}\n",
            self.gptq.program.display(),
            input.line
        );
        seeds::write(&folder.join("again.sh"), again.as_bytes())?;
        let said: String = verdict.stderr.chars().take(400).collect();
        println!(
            "{target} {name}: {}\n  {}\n  {said:?}\n  {}",
            verdict.faults.join("; "),
            input.line,
            folder.display()
        );
        Ok(())
    }
}
