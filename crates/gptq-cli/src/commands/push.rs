//! `gptq push`.

use gptq_hub::{Push, PushContent, PushFile, Pushed, push_branches};
use gptq_repository::Repository;

use crate::Verdict;
use crate::args::PushArgs;
use crate::failure::Failure;
use crate::models::options;
use crate::progress::Bytes;

const MESSAGE: &str = "GPTQ checkpoint";

pub fn run(args: &PushArgs) -> Result<Verdict, Failure> {
    let repository = Repository::open(&args.repository)?;
    let names = match args.branch.as_slice() {
        [] => repository.branches()?,
        chosen => chosen.to_vec(),
    };
    if names.is_empty() {
        let text = format!("`{}` has no branch", args.repository.display());
        return Err(Failure::new(text));
    }
    let branches = (names.into_iter())
        .map(|name| Ok((name.clone(), files(&repository, &name)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let push = Push {
        repo: &args.target,
        private: args.private,
        update: args.update,
        branches,
        message: MESSAGE,
    };
    let mut bar = Bytes::new();
    let pushed = push_branches(&push, &options(&args.hub), &mut |file, done, all| {
        bar.show(file, done, all);
    })?;
    bar.end();
    for (branch, what) in pushed {
        match what {
            Pushed::AlreadyThere => eprintln!("{branch}: was there already"),
            Pushed::Committed { objects } => {
                eprintln!("{branch}: pushed, {objects} large files sent");
            }
        }
    }
    Ok(Verdict::Yes)
}

fn files(repository: &Repository, branch: &str) -> Result<Vec<PushFile>, Failure> {
    (repository.files(branch)?.into_iter())
        .map(|file| {
            let content = match (repository.object(branch, &file)?, &file.oid) {
                (Some(object), Some(oid)) => PushContent::Object {
                    file: object,
                    oid: oid.clone(),
                },
                _ => PushContent::Inline {
                    bytes: repository.read(branch, &file.name)?.unwrap_or_default(),
                    git_oid: file.git_oid.clone(),
                },
            };
            Ok(PushFile {
                path: file.name,
                size: file.bytes,
                content,
            })
        })
        .collect()
}
