//! The hub, played by a small server on this machine.
#![cfg(feature = "hub")]
#![allow(missing_docs)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use gptq_hub::{HubError, ResolveOptions, fetch_dataset_file, resolve};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// sha256 of `weights`
const WEIGHTS_SHA256: &str = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c";
/// No test asks for more.
const MAX_REQUESTS: usize = 40;

#[derive(Clone)]
enum Answer {
    /// A small file.
    File(&'static str),
    /// A large file: its name among the blobs, its bytes, behind a redirect.
    Large(&'static str, &'static str),
    Json(String),
    Status(u16),
}

struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
    address: std::net::SocketAddr,
}

impl Hub {
    fn with(routes: &[(&str, Answer)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let routes: HashMap<String, Answer> = routes
            .iter()
            .map(|(path, answer)| (path.to_string(), answer.clone()))
            .collect();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().take(MAX_REQUESTS) {
                let Some(path) = answer_one(stream.unwrap(), &routes) else {
                    return;
                };
                seen.lock().unwrap().push(path);
            }
        });
        Hub {
            endpoint: format!("http://{address}"),
            requests,
            thread: Some(thread),
            address,
        }
    }

    fn options(&self, cache: &tempfile::TempDir) -> ResolveOptions {
        ResolveOptions {
            offline: false,
            cache_dir: Some(cache.path().to_path_buf()),
            endpoint: Some(self.endpoint.clone()),
            token: Some("secret".into()),
        }
    }

    fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Ok(mut stream) = TcpStream::connect(self.address) {
            let _ = stream.write_all(b"STOP\r\n\r\n");
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers one request and closes; `None` for the request to stop.
fn answer_one(mut stream: TcpStream, routes: &HashMap<String, Answer>) -> Option<String> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_string();
    let mut start = None;
    for line in lines {
        let line = line.ok()?.to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(range) = line.strip_prefix("range: bytes=") {
            start = Some(range.to_string());
        }
    }
    let (file, blob) = match path.strip_prefix("/cdn") {
        Some(rest) => (rest.to_string(), true),
        None => (path.clone(), false),
    };
    let response = match routes.get(&file) {
        None => plain(404, "", "Entry not found"),
        Some(Answer::Status(status)) => plain(*status, "", "no"),
        Some(Answer::Json(text)) => plain(200, "", text),
        Some(Answer::File(text)) => {
            let tag = format!("etag: \"{}\"\r\n", "e".repeat(40 - path.len() % 9));
            ranged(text, start, &format!("{tag}x-repo-commit: {COMMIT}\r\n"))
        }
        Some(Answer::Large(_, text)) if blob => ranged(text, start, ""),
        Some(Answer::Large(name, _)) => {
            let host = stream.local_addr().unwrap();
            let headers = format!(
                "location: http://{host}/cdn{file}\r\nx-linked-etag: \"{name}\"\r\netag: \"x\"\r\nx-repo-commit: {COMMIT}\r\n"
            );
            plain(302, &headers, "")
        }
    };
    stream.write_all(response.as_bytes()).unwrap();
    Some(path)
}

fn plain(status: u16, headers: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} Answer\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn ranged(text: &str, range: Option<String>, headers: &str) -> String {
    let range = range.unwrap_or_else(|| "0-".into());
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end
        .parse()
        .map_or(text.len(), |end: usize| end + 1)
        .min(text.len());
    let headers = format!(
        "{headers}content-range: bytes {start}-{}/{}\r\n",
        end.saturating_sub(1),
        text.len()
    );
    plain(206, &headers, &text[start..end])
}

fn info(files: &[&str]) -> Answer {
    let siblings: Vec<_> = files
        .iter()
        .map(|name| serde_json::json!({"rfilename": name}))
        .collect();
    Answer::Json(serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string())
}

fn model_routes(digest: &'static str) -> Vec<(String, Answer)> {
    let at = |file: &str| format!("/owner/name/resolve/{COMMIT}/{file}");
    vec![
        (
            "/api/models/owner/name/revision/gptq-4bit".to_string(),
            info(&[
                "README.md",
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "a/b.json",
            ]),
        ),
        (at("README.md"), Answer::File("# card")),
        (at("config.json"), Answer::File("{}")),
        (at("tokenizer.json"), Answer::File("{\"t\": 1}")),
        (at("model.safetensors"), Answer::Large(digest, "weights")),
    ]
}

fn serve(routes: &[(String, Answer)]) -> Hub {
    let routes: Vec<_> = routes
        .iter()
        .map(|(p, a)| (p.as_str(), a.clone()))
        .collect();
    Hub::with(&routes)
}

#[test]
fn a_branch_is_fetched_once_and_then_found_in_the_cache() {
    let hub = serve(&model_routes(WEIGHTS_SHA256));
    let cache = tempfile::tempdir().unwrap();
    let mut reports = Vec::new();
    let folder = resolve(
        "owner/name:gptq-4bit",
        &hub.options(&cache),
        &mut |file, done, total| {
            reports.push((file.to_string(), done, total));
        },
    )
    .unwrap();
    assert_eq!(
        folder,
        cache
            .path()
            .join("models--owner--name/snapshots")
            .join(COMMIT)
    );
    assert_eq!(
        fs::read_to_string(folder.join("model.safetensors")).unwrap(),
        "weights"
    );
    assert!(folder.join("tokenizer.json").is_file());
    assert!(folder.join("README.md").is_file());
    assert!(!folder.join("a").exists());
    assert!(reports.contains(&("model.safetensors".into(), 7, 7)));
    let reference = cache.path().join("models--owner--name/refs/gptq-4bit");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);

    let asked = hub.requests();
    let again = resolve(
        "owner/name:gptq-4bit",
        &hub.options(&cache),
        &mut |_, _, _| {},
    )
    .unwrap();
    assert_eq!(again, folder);
    assert_eq!(hub.requests(), asked);
}

#[test]
fn a_large_file_with_other_bytes_is_refused_and_removed() {
    let wrong: &'static str = "1111111111111111111111111111111111111111111111111111111111111111";
    let hub = serve(&model_routes(wrong));
    let cache = tempfile::tempdir().unwrap();
    let error = resolve(
        "owner/name:gptq-4bit",
        &hub.options(&cache),
        &mut |_, _, _| {},
    )
    .unwrap_err();
    assert!(matches!(error, HubError::Digest { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("`model.safetensors` of `owner/name` at `gptq-4bit`"),
        "{text}"
    );
    let blob = cache.path().join("models--owner--name/blobs").join(wrong);
    assert!(!blob.exists());
}

fn failure(routes: &[(&str, Answer)]) -> HubError {
    let hub = Hub::with(routes);
    let cache = tempfile::tempdir().unwrap();
    resolve("owner/name", &hub.options(&cache), &mut |_, _, _| {}).unwrap_err()
}

#[test]
fn each_refusal_is_one_line_with_repository_and_revision() {
    let api = "/api/models/owner/name/revision/main";
    let missing = failure(&[]);
    assert_eq!(
        missing.to_string(),
        "the hub has no model `owner/name` at `main` (status 404)"
    );
    let gated = failure(&[(api, Answer::Status(401))]);
    assert_eq!(
        gated.to_string(),
        "the hub refuses `owner/name` at `main` (status 401)"
    );
    assert!(gated.hint().unwrap().contains("HF_TOKEN"));
    let broken = failure(&[(api, Answer::Status(503))]);
    assert!(
        broken
            .to_string()
            .contains("cannot fetch model `owner/name` at `main`")
    );
    assert!(broken.to_string().ends_with("status 503"), "{broken}");

    let pickles = failure(&[(api, info(&["config.json", "pytorch_model.bin"]))]);
    assert!(matches!(pickles, HubError::OnlyPickles { .. }), "{pickles}");
    let gone = failure(&[(api, info(&["config.json", "model.safetensors"]))]);
    assert_eq!(
        gone.to_string(),
        "the hub has no file `config.json` of `owner/name` at `main` (status 404)"
    );
    for error in [missing, gated, broken, pickles, gone] {
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn a_hub_that_does_not_answer_is_named() {
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let cache = tempfile::tempdir().unwrap();
    let options = ResolveOptions {
        cache_dir: Some(cache.path().to_path_buf()),
        endpoint: Some(format!("http://{address}")),
        ..ResolveOptions::default()
    };
    let error = resolve("owner/name", &options, &mut |_, _, _| {}).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("cannot fetch model `owner/name` at `main` from http://127.0.0.1"));
    assert!(text.contains("connection refused"), "{text}");
    assert!(error.hint().is_some());
}

#[test]
fn a_dataset_file_keeps_its_folder() {
    let path = "/datasets/owner/data/resolve/refs%2Fconvert%2Fparquet/en/train.parquet";
    let hub = Hub::with(&[(path, Answer::File("rows"))]);
    let cache = tempfile::tempdir().unwrap();
    let fetch = |file| {
        let options = hub.options(&cache);
        fetch_dataset_file("owner/data", "refs/convert/parquet", file, &options)
    };
    let file = fetch("en/train.parquet").unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "rows");
    assert!(file.ends_with("en/train.parquet"));
    let asked = hub.requests();
    assert_eq!(fetch("en/train.parquet").unwrap(), file);
    assert_eq!(hub.requests(), asked);
    let error = fetch("en/test.parquet").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no file `en/test.parquet` of `owner/data`"),
        "{error}"
    );
}
