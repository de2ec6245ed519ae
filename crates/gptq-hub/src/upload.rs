//! The requests of a push.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use gptq_types::outside_name::{file_name, relative_path, shown};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::Response;
use ureq::{Agent, Body, SendBody};

use crate::HubError;
use crate::push::{Push, PushContent, PushFile, Pushed};
use crate::reference::{is_repo, is_revision};
use crate::resolve::{ResolveOptions, Settings};

const CONNECT_SECONDS: u64 = 30;
/// A store may hash gigabytes before it answers.
const ANSWER_SECONDS: u64 = 600;
const LFS: &str = "application/vnd.git-lfs+json";
const NDJSON: &str = "application/x-ndjson";
/// The hub puts it into every new repository.
const ATTRIBUTES: &str = ".gitattributes";
/// Characters of the hub's message shown in an error.
const MOST_REASON: usize = 200;

type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64);

pub(crate) fn push(
    push: &Push<'_>,
    options: &ResolveOptions,
    progress: Progress<'_>,
) -> Result<Vec<(String, Pushed)>, HubError> {
    check_names(push)?;
    let hub = Hub::new(push.repo, options)?;
    // Whatever the hub answers: it has the token, and may repeat it.
    push_to(&hub, push, progress).map_err(|error| without(error, &hub.token))
}

/// Removes the token from an error.
fn without(error: HubError, token: &str) -> HubError {
    let clean = |reason: String| reason.replace(token, "***");
    match error {
        HubError::Push { doing, reason } => HubError::Push {
            doing,
            reason: clean(reason),
        },
        HubError::NotAllowed {
            doing,
            status,
            reason,
        } => HubError::NotAllowed {
            doing,
            status,
            reason: clean(reason),
        },
        other => other,
    }
}

fn check_names(push: &Push<'_>) -> Result<(), HubError> {
    if !is_repo(push.repo) {
        return Err(HubError::Reference(push.repo.to_string()));
    }
    for (branch, files) in &push.branches {
        if !is_revision(branch) {
            return Err(HubError::Reference(format!("{}:{branch}", push.repo)));
        }
        for file in files {
            file_name(&file.path).map_err(|error| failed("push", &error.to_string()))?;
        }
    }
    Ok(())
}

fn push_to(
    hub: &Hub<'_>,
    push: &Push<'_>,
    progress: Progress<'_>,
) -> Result<Vec<(String, Pushed)>, HubError> {
    hub.make_repository(push.private)?;
    // All branches are looked at before the first byte is sent.
    let mut found = Vec::new();
    for (branch, files) in &push.branches {
        let there = hub.files(branch)?;
        if !push.update && there.as_ref().is_some_and(|there| is_taken(there, files)) {
            return Err(HubError::BranchTaken {
                repo: push.repo.to_string(),
                branch: branch.clone(),
            });
        }
        found.push(there);
    }
    let mut results = Vec::new();
    for ((branch, files), there) in push.branches.iter().zip(found) {
        let there = match there {
            Some(there) => there,
            None => {
                hub.make_branch(branch)?;
                hub.files(branch)?.unwrap_or_default()
            }
        };
        let pushed = match is_same(&there, files) {
            true => Pushed::AlreadyThere,
            false => {
                let objects = hub.send_objects(files, progress)?;
                hub.commit(branch, files, &there, push.message)?;
                Pushed::Committed { objects }
            }
        };
        results.push((branch.clone(), pushed));
    }
    Ok(results)
}

/// A file as the hub lists it.
#[derive(Debug, Deserialize)]
struct Listed {
    path: String,
    oid: String,
    #[serde(default)]
    lfs: Option<ListedObject>,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Deserialize)]
struct ListedObject {
    oid: String,
}

fn is_listed(file: &PushFile, there: &[Listed]) -> bool {
    there.iter().any(|listed| {
        listed.path == file.path
            && match (&file.content, &listed.lfs) {
                (PushContent::Object { oid, .. }, Some(lfs)) => lfs.oid == oid.as_str(),
                (PushContent::Inline { git_oid, .. }, None) => listed.oid == *git_oid,
                _ => false,
            }
    })
}

fn is_same(there: &[Listed], files: &[PushFile]) -> bool {
    let known = |listed: &Listed| files.iter().any(|file| file.path == listed.path);
    files.iter().all(|file| is_listed(file, there)) && there.iter().all(known)
}

/// Whether a branch holds anything that this push would replace or remove.
fn is_taken(there: &[Listed], files: &[PushFile]) -> bool {
    let plain = there.iter().all(|listed| listed.path == ATTRIBUTES);
    !plain && !is_same(there, files)
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<BatchObject>,
}

#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Actions {
    #[serde(default)]
    upload: Option<Action>,
    #[serde(default)]
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Map<String, Value>,
}

/// One repository on one hub.
struct Hub<'a> {
    agent: Agent,
    endpoint: String,
    token: String,
    repo: &'a str,
}

impl<'a> Hub<'a> {
    fn new(repo: &'a str, options: &ResolveOptions) -> Result<Self, HubError> {
        let settings = Settings::new(options, &|name| std::env::var(name).ok())?;
        if settings.offline {
            return Err(HubError::Push {
                doing: format!("push to `{repo}`"),
                reason: "offline".to_string(),
            });
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(CONNECT_SECONDS)))
            .timeout_recv_response(Some(Duration::from_secs(ANSWER_SECONDS)))
            .timeout_recv_body(Some(Duration::from_secs(ANSWER_SECONDS)))
            .build();
        Ok(Hub {
            agent: config.into(),
            endpoint: settings.endpoint.address,
            token: settings.token.ok_or(HubError::NoToken)?,
            repo,
        })
    }

    fn make_repository(&self, private: bool) -> Result<(), HubError> {
        let (owner, name) = self.repo.split_once('/').unwrap_or(("", self.repo));
        let doing = format!("make repository `{}`", self.repo);
        let body = json!({
            "type": "model", "organization": owner, "name": name, "private": private,
        });
        let url = format!("{}/api/repos/create", self.endpoint);
        let answer = self.post(&url, "application/json", &body.to_string(), &doing)?;
        match answer.status().as_u16() {
            409 => Ok(()), // it exists
            _ => accepted(answer, &doing).map(|_| ()),
        }
    }

    /// The files of a branch; `None` where there is none of that name.
    fn files(&self, branch: &str) -> Result<Option<Vec<Listed>>, HubError> {
        let doing = format!("list branch `{branch}` of `{}`", self.repo);
        let url = format!(
            "{}/api/models/{}/tree/{}?recursive=true",
            self.endpoint,
            self.repo,
            in_path(branch)
        );
        let request = self.agent.get(&url).header("authorization", self.bearer());
        let answer = request.call().map_err(|error| broken(&doing, &error))?;
        if answer.status().as_u16() == 404 {
            return Ok(None);
        }
        let text = accepted(answer, &doing)?;
        let listed: Vec<Listed> = parse(&text, &doing)?;
        for file in &listed {
            relative_path(&file.path).map_err(|error| failed(&doing, &error.to_string()))?;
        }
        let files = listed.into_iter().filter(|listed| listed.kind == "file");
        Ok(Some(files.collect()))
    }

    fn make_branch(&self, branch: &str) -> Result<(), HubError> {
        let doing = format!("make branch `{branch}` of `{}`", self.repo);
        let url = format!(
            "{}/api/models/{}/branch/{}",
            self.endpoint,
            self.repo,
            in_path(branch)
        );
        let body = json!({ "emptyBranch": true }).to_string();
        let answer = self.post(&url, "application/json", &body, &doing)?;
        match answer.status().as_u16() {
            409 => Ok(()),
            _ => accepted(answer, &doing).map(|_| ()),
        }
    }

    /// Sends what the store lacks; how many that were.
    fn send_objects(&self, files: &[PushFile], progress: Progress<'_>) -> Result<usize, HubError> {
        let objects: Vec<(&PushFile, &Path, &str)> = (files.iter())
            .filter_map(|file| match &file.content {
                PushContent::Object { file: path, oid } => {
                    Some((file, path.as_path(), oid.as_str()))
                }
                PushContent::Inline { .. } => None,
            })
            .collect();
        if objects.is_empty() {
            return Ok(0);
        }
        let doing = format!("upload to `{}`", self.repo);
        let wanted: Vec<Value> = (objects.iter())
            .map(|(file, _, oid)| json!({ "oid": oid, "size": file.size }))
            .collect();
        let body = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "hash_algo": "sha256",
            "objects": wanted,
        });
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.endpoint, self.repo);
        let answer = self.post(&url, LFS, &body.to_string(), &doing)?;
        let batch: Batch = parse(&accepted(answer, &doing)?, &doing)?;
        let mut sent = 0;
        for (file, path, oid) in objects {
            let doing = format!("upload `{}` to `{}`", file.path, self.repo);
            let Some(object) = batch.objects.iter().find(|object| object.oid == oid) else {
                return Err(failed(&doing, "the hub's answer does not name it"));
            };
            if let Some(error) = &object.error {
                return Err(failed(&doing, &shown(&error.to_string(), MOST_REASON)));
            }
            let Some(actions) = &object.actions else {
                continue; // it is there
            };
            if let Some(upload) = &actions.upload {
                match upload.header.get("chunk_size") {
                    Some(size) => {
                        self.put_parts(upload, size, file, path, oid, &doing, progress)?
                    }
                    None => {
                        let opened = File::open(path).map_err(|e| HubError::io("read", path, e))?;
                        self.put(upload, &opened, (0, file.size), file, &doing, progress)?;
                    }
                }
                sent += 1;
            }
            if let Some(verify) = &actions.verify {
                let body = json!({ "oid": oid, "size": file.size }).to_string();
                let answer = self.post(&verify.href, LFS, &body, &doing)?;
                accepted(answer, &doing)?;
            }
        }
        Ok(sent)
    }

    /// Bytes `from..to` of a file to an address of the store, which needs no token of ours.
    /// Returns the answer's etag.
    fn put(
        &self,
        action: &Action,
        opened: &File,
        (from, to): (u64, u64),
        file: &PushFile,
        doing: &str,
        progress: Progress<'_>,
    ) -> Result<String, HubError> {
        let mut part = opened;
        (part.seek(SeekFrom::Start(from))).map_err(|error| failed(doing, &error.to_string()))?;
        let mut metered = Metered {
            inner: part.take(to - from),
            done: from,
            report: &mut |done| progress(&file.path, done, file.size),
        };
        let mut request = (self.agent.put(&action.href)).header("content-length", to - from);
        for (name, value) in &action.header {
            if let Some(value) = value.as_str() {
                request = request.header(name, value);
            }
        }
        let sent = request.send(SendBody::from_reader(&mut metered));
        let answer = sent.map_err(|error| broken(doing, &error))?;
        let etag = answer
            .headers()
            .get("etag")
            .and_then(|etag| etag.to_str().ok());
        let etag = etag.unwrap_or_default().to_string();
        accepted(answer, doing)?;
        Ok(etag)
    }

    /// A file in parts, each to an address of its own, and then the list of them.
    #[allow(clippy::too_many_arguments)]
    fn put_parts(
        &self,
        upload: &Action,
        size: &Value,
        file: &PushFile,
        path: &Path,
        oid: &str,
        doing: &str,
        progress: Progress<'_>,
    ) -> Result<(), HubError> {
        let text = size
            .as_str()
            .map_or_else(|| size.to_string(), str::to_string);
        let size: u64 = match text.parse() {
            Ok(size) if size > 0 => size,
            _ => {
                let text = shown(&text, MOST_REASON);
                return Err(failed(doing, &format!("chunk_size `{text}` is not a size")));
            }
        };
        let mut addresses: Vec<(u64, &str)> = (upload.header.iter())
            .filter_map(|(number, address)| Some((number.parse().ok()?, address.as_str()?)))
            .collect();
        addresses.sort();
        if addresses.len() as u64 != file.size.div_ceil(size) {
            let text = format!("{} addresses for parts of {size} bytes", addresses.len());
            return Err(failed(doing, &text));
        }
        let opened = File::open(path).map_err(|error| HubError::io("read", path, error))?;
        let mut parts = Vec::new();
        for (index, (number, address)) in addresses.into_iter().enumerate() {
            let from = index as u64 * size;
            let part = Action {
                href: address.to_string(),
                header: Map::new(),
            };
            let range = (from, (from + size).min(file.size));
            let etag = self.put(&part, &opened, range, file, doing, progress)?;
            parts.push(json!({ "partNumber": number, "etag": etag }));
        }
        let body = json!({ "oid": oid, "parts": parts }).to_string();
        // Signed like the parts: without the token.
        let request = (self.agent.post(&upload.href))
            .header("content-type", LFS)
            .header("accept", LFS);
        let answer = request.send(&body).map_err(|error| broken(doing, &error))?;
        accepted(answer, doing).map(|_| ())
    }

    /// One commit that makes the branch hold `files` and nothing else.
    fn commit(
        &self,
        branch: &str,
        files: &[PushFile],
        there: &[Listed],
        message: &str,
    ) -> Result<(), HubError> {
        let doing = format!("commit to branch `{branch}` of `{}`", self.repo);
        let mut lines = vec![json!({
            "key": "header", "value": { "summary": message, "description": "" },
        })];
        for listed in there {
            if files.iter().all(|file| file.path != listed.path) {
                lines.push(json!({ "key": "deletedFile", "value": { "path": listed.path } }));
            }
        }
        for file in files.iter().filter(|file| !is_listed(file, there)) {
            lines.push(match &file.content {
                PushContent::Inline { bytes, .. } => json!({ "key": "file", "value": {
                    "path": file.path,
                    "encoding": "base64",
                    "content": base64::engine::general_purpose::STANDARD.encode(bytes),
                }}),
                PushContent::Object { oid, .. } => json!({ "key": "lfsFile", "value": {
                    "path": file.path, "algo": "sha256", "oid": oid, "size": file.size,
                }}),
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let url = format!(
            "{}/api/models/{}/commit/{}",
            self.endpoint,
            self.repo,
            in_path(branch)
        );
        let answer = self.post(&url, NDJSON, &body, &doing)?;
        accepted(answer, &doing).map(|_| ())
    }

    fn post(
        &self,
        url: &str,
        kind: &str,
        body: &str,
        doing: &str,
    ) -> Result<Response<Body>, HubError> {
        let accept = if kind == LFS { LFS } else { "application/json" };
        let mut request = (self.agent.post(url))
            .header("content-type", kind)
            .header("accept", accept);
        // Addresses that the hub hands out may lie elsewhere, where the token has no business.
        if url.starts_with(&format!("{}/", self.endpoint)) {
            request = request.header("authorization", self.bearer());
        }
        request.send(body).map_err(|error| broken(doing, &error))
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }
}

/// Slashes of a branch are part of its name.
fn in_path(branch: &str) -> String {
    branch.replace('/', "%2F").replace('+', "%2B")
}

/// The text of a good answer; else what the hub says, on one line.
fn accepted(mut answer: Response<Body>, doing: &str) -> Result<String, HubError> {
    let status = answer.status().as_u16();
    let text = answer.body_mut().read_to_string();
    if (200..300).contains(&status) {
        return text.map_err(|error| broken(doing, &error));
    }
    let reason = said(&text.unwrap_or_default());
    Err(match status {
        401 | 402 | 403 | 413 | 429 | 507 => HubError::NotAllowed {
            doing: doing.to_string(),
            status,
            reason,
        },
        _ => failed(doing, &format!("status {status}{reason}")),
    })
}

/// `: ` and the hub's own explanation, where there is one.
fn said(text: &str) -> String {
    let parsed: Value = serde_json::from_str(text).unwrap_or_default();
    let error = parsed["error"].as_str().or(parsed["message"].as_str());
    let line: String = (error.unwrap_or_default().chars())
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST_REASON)
        .collect();
    match line.trim() {
        "" => String::new(),
        line => format!(": {line}"),
    }
}

fn parse<T: for<'de> Deserialize<'de>>(text: &str, doing: &str) -> Result<T, HubError> {
    serde_json::from_str(text).map_err(|error| {
        failed(
            doing,
            &format!(
                "the hub's answer is not understood: {}",
                shown(&error.to_string(), MOST_REASON)
            ),
        )
    })
}

fn failed(doing: &str, reason: &str) -> HubError {
    HubError::Push {
        doing: doing.to_string(),
        reason: reason.to_string(),
    }
}

fn broken(doing: &str, error: &ureq::Error) -> HubError {
    let reason = match error {
        ureq::Error::Io(error) => error.to_string(),
        other => other.to_string(),
    };
    failed(doing, &shown(&reason, MOST_REASON))
}

struct Metered<'a, R> {
    inner: R,
    done: u64,
    report: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.done += read as u64;
        (self.report)(self.done);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hub that repeats the token in its answer had it printed.
    #[test]
    fn no_error_repeats_the_token() {
        let reason = || ": Invalid token hf_secret".to_string();
        let doing = || "push to `a/b`".to_string();
        for error in [
            failed(&doing(), &reason()),
            HubError::NotAllowed {
                doing: doing(),
                status: 401,
                reason: reason(),
            },
        ] {
            let text = without(error, "hf_secret").to_string();
            assert!(
                !text.contains("hf_secret") && text.contains("Invalid"),
                "{text}"
            );
        }
    }
}
