//! The hub, played by a small server on this machine.
#![cfg(feature = "hub")]
#![allow(missing_docs)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use gptq_hub::{HubError, Patience, ResolveOptions, fetch_dataset_file, find_dataset, resolve};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// sha256 of `weights`
const WEIGHTS_SHA256: &str = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c";
/// No test asks for more.
const MAX_REQUESTS: usize = 80;
/// The client's timeout for a server that a test keeps silent.
const SILENCE: Duration = Duration::from_millis(300);

#[derive(Clone)]
enum Answer {
    /// A small file.
    File(&'static str),
    /// A large file: its name among the blobs, its bytes, behind a redirect.
    Large(&'static str, &'static str),
    Json(String),
    Status(u16),
    /// These answers in turn, the last one again and again.
    Turns(Vec<Raw>),
}

/// Bytes to send, and the server's behaviour afterwards.
#[derive(Clone)]
enum Raw {
    Bytes(String),
    /// These bytes, then silence.
    Stall(String),
}

/// A request as it was received: path and headers, in lower case.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<Request>>>,
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
            let mut turns = HashMap::new();
            let mut silent = Vec::new();
            for stream in listener.incoming().take(MAX_REQUESTS) {
                let mut stream = stream.unwrap();
                let Some(request) = read_request(&stream) else {
                    return;
                };
                seen.lock().unwrap().push(request.clone());
                let response = respond(&request, &routes, &mut turns, address);
                let (Raw::Bytes(text) | Raw::Stall(text)) = &response;
                let _ = stream.write_all(text.as_bytes());
                if matches!(response, Raw::Stall(_)) {
                    silent.push(stream);
                }
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
            patience: Patience {
                silence: SILENCE,
                first_wait: Duration::from_millis(5),
                retries: 3,
            },
        }
    }

    fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    /// Requests whose path ends with `end`.
    fn asked(&self, end: &str) -> Vec<Request> {
        let requests = self.requests.lock().unwrap();
        let found = requests
            .iter()
            .filter(|request| request.path.ends_with(end));
        found.cloned().collect()
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

/// `None` for the request to stop.
fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_string();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line.ok()?;
        match line.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_string()),
            None => break,
        };
    }
    Some(Request { path, headers })
}

fn respond(
    request: &Request,
    routes: &HashMap<String, Answer>,
    turns: &mut HashMap<String, usize>,
    host: std::net::SocketAddr,
) -> Raw {
    let path = &request.path;
    let (file, blob) = match path.strip_prefix("/cdn") {
        Some(rest) => (rest.to_string(), true),
        None => (path.clone(), false),
    };
    let start = request.headers.get("range");
    let start = start.and_then(|range| range.strip_prefix("bytes="));
    Raw::Bytes(match routes.get(&file) {
        None => plain(404, "", "Entry not found"),
        Some(Answer::Status(status)) => plain(*status, "", "no"),
        Some(Answer::Json(text)) => plain(200, "", text),
        Some(Answer::File(text)) => {
            let tag = format!("etag: \"{}\"\r\n", "e".repeat(40 - path.len() % 9));
            ranged(text, start, &format!("{tag}x-repo-commit: {COMMIT}\r\n"))
        }
        Some(Answer::Large(_, text)) if blob => ranged(text, start, ""),
        Some(Answer::Large(name, _)) => {
            let headers = format!(
                "location: http://{host}/cdn{file}\r\nx-linked-etag: \"{name}\"\r\netag: \"x\"\r\nx-repo-commit: {COMMIT}\r\n"
            );
            plain(302, &headers, "")
        }
        Some(Answer::Turns(answers)) => {
            let turn = turns.entry(file).or_insert(0);
            let answer = answers[(*turn).min(answers.len() - 1)].clone();
            *turn += 1;
            return answer;
        }
    })
}

fn plain(status: u16, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status} Answer\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}"
    )
}

/// An answer that promises `length` bytes and closes after those of `body`.
fn cut(headers: &str, length: usize, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\n{headers}content-length: {length}\r\n\r\n{body}")
}

fn ranged(text: &str, range: Option<&str>, headers: &str) -> String {
    let Some((start, end)) = range.and_then(|range| range.split_once('-')) else {
        return plain(200, headers, text);
    };
    let start: usize = start.parse().unwrap();
    let end = end
        .parse()
        .map_or(text.len(), |end: usize| end + 1)
        .min(text.len());
    let last = end.saturating_sub(1);
    let headers = format!(
        "{headers}content-range: bytes {start}-{last}/{}\r\n",
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
        broken.to_string().contains("gave up after 4 tries"),
        "{broken}"
    );
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
        patience: Patience {
            retries: 0,
            ..Patience::default()
        },
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

/// The hub's own copy as Parquet is taken where it is there, else the repository's files; what was
/// fetched is found again without the network.
#[test]
fn a_dataset_is_found_by_its_name() {
    let converted = "/api/datasets/acme/chats/revision/refs%2Fconvert%2Fparquet";
    let own = "/api/datasets/acme/chats/revision/main";
    let file = format!("/datasets/acme/chats/resolve/{COMMIT}/data/train.jsonl");
    let hub = Hub::with(&[
        (
            own,
            info(&["README.md", "data/train.jsonl", "data/test.jsonl"]),
        ),
        (&file, Answer::File("rows")),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let mut options = hub.options(&cache);
    let has_rows = |name: &str| name.ends_with(".jsonl") || name.ends_with(".parquet");
    let find = |options: &ResolveOptions, config: Option<&str>, split: &str| {
        find_dataset("acme/chats", config, split, &has_rows, options)
    };
    let found = find(&options, None, "train").unwrap();
    assert_eq!(found.files, ["data/train.jsonl"]);
    assert_eq!(
        (found.revision.as_str(), found.commit.as_str()),
        ("main", COMMIT)
    );
    let path = fetch_dataset_file("acme/chats", &found.commit, &found.files[0], &options).unwrap();
    assert_eq!(fs::read_to_string(path).unwrap(), "rows");
    let error = find(&options, None, "train_sft").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no file is of split `train_sft`"),
        "{error}"
    );

    options.offline = true;
    assert_eq!(find(&options, None, "train").unwrap(), found);
    let elsewhere = ResolveOptions {
        cache_dir: Some(cache.path().join("none")),
        ..options
    };
    let error = find(&elsewhere, None, "train").unwrap_err();
    assert!(
        error
            .to_string()
            .contains("offline, and the hub cache has no file of `acme/chats`"),
        "{error}"
    );

    let hub = Hub::with(&[(
        converted,
        info(&["en/train/0000.parquet", "en/test/0000.parquet"]),
    )]);
    let cache = tempfile::tempdir().unwrap();
    let found = find(&hub.options(&cache), Some("en"), "test").unwrap();
    assert_eq!(found.files, ["en/test/0000.parquet"]);
    assert_eq!(found.revision, "refs/convert/parquet");
    let gone = find(&Hub::with(&[]).options(&cache), None, "train").unwrap_err();
    assert!(matches!(gone, HubError::NotFound { .. }), "{gone}");
}

const FILE: &str = "config.json";

/// A model whose `config.json` and weights are answered like this; everything else is well.
fn fetched(config: Answer, weights: Answer) -> (Hub, tempfile::TempDir, Result<PathBuf, HubError>) {
    let mut routes = model_routes(WEIGHTS_SHA256);
    let set = |routes: &mut Vec<(String, Answer)>, end: &str, answer: Answer| {
        let route = routes.iter_mut().find(|(path, _)| path.ends_with(end));
        route.unwrap().1 = answer;
    };
    set(&mut routes, FILE, config);
    set(&mut routes, "model.safetensors", weights);
    let hub = serve(&routes);
    let cache = tempfile::tempdir().unwrap();
    let options = hub.options(&cache);
    let result = resolve("owner/name:gptq-4bit", &options, &mut |_, _, _| {});
    (hub, cache, result)
}

fn large() -> Answer {
    Answer::Large(WEIGHTS_SHA256, "weights")
}

/// The weights at the hub itself: its sha256 is in the header of the file.
fn linked() -> String {
    format!("x-linked-etag: \"{WEIGHTS_SHA256}\"\r\nx-repo-commit: {COMMIT}\r\n")
}

fn content(folder: &Result<PathBuf, HubError>, file: &str) -> String {
    let folder = folder.as_ref().unwrap_or_else(|error| panic!("{error}"));
    fs::read_to_string(folder.join(file)).unwrap()
}

#[test]
fn a_server_without_ranges_or_etags_serves_all_the_same() {
    // "header content-range is missing" once ended every fetch from a mirror, and every empty file
    let bare = Answer::Turns(vec![Raw::Bytes(plain(200, "", "{}"))]);
    let (hub, _cache, folder) = fetched(bare, large());
    assert_eq!(content(&folder, FILE), "{}");
    for request in hub.requests.lock().unwrap().iter() {
        assert_eq!(
            request.headers["accept-encoding"], "identity",
            "{request:?}"
        );
        assert!(!request.headers.contains_key("range"), "{request:?}");
    }
    let (_hub, _cache, folder) = fetched(Answer::File(""), large());
    assert_eq!(content(&folder, FILE), "");
}

#[test]
fn bytes_that_are_packed_in_spite_of_identity_are_unpacked() {
    // gzip of `{}`
    let packed: [u8; 22] = [
        31, 139, 8, 0, 0, 0, 0, 0, 2, 255, 171, 174, 5, 0, 67, 191, 166, 163, 2, 0, 0, 0,
    ];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        read_request(&stream).unwrap();
        let head = format!(
            "HTTP/1.1 200 OK\r\nx-repo-commit: {COMMIT}\r\ncontent-encoding: gzip\r\ncontent-length: 22\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&packed).unwrap();
    });
    let cache = tempfile::tempdir().unwrap();
    let options = ResolveOptions {
        cache_dir: Some(cache.path().to_path_buf()),
        endpoint: Some(format!("http://{address}")),
        ..ResolveOptions::default()
    };
    let file = fetch_dataset_file("o/d", "main", "a.json", &options).unwrap();
    assert_eq!(fs::read_to_string(file).unwrap(), "{}");
    server.join().unwrap();
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let other = Hub::with(&[("/elsewhere", Answer::File("weights"))]);
    let headers = format!("location: {}/elsewhere\r\n{}", other.endpoint, linked());
    let away = Answer::Turns(vec![Raw::Bytes(plain(302, &headers, ""))]);
    let (hub, _cache, folder) = fetched(Answer::File("{}"), away);
    assert_eq!(content(&folder, "model.safetensors"), "weights");
    let at_hub = hub.asked("model.safetensors");
    assert_eq!(at_hub[0].headers["authorization"], "Bearer secret");
    let elsewhere = other.asked("/elsewhere");
    assert!(
        !elsewhere[0].headers.contains_key("authorization"),
        "{elsewhere:?}"
    );
}

#[test]
fn a_silent_or_busy_server_is_asked_again() {
    let stall = Raw::Stall(cut("", 9, "{"));
    let config = Answer::Turns(vec![stall, Raw::Bytes(plain(200, "", "{}"))]);
    let busy = Raw::Bytes(plain(503, "", ""));
    let asks_to_wait = Raw::Bytes(plain(429, "retry-after: 0\r\n", ""));
    let good = Raw::Bytes(plain(200, &linked(), "weights"));
    let weights = Answer::Turns(vec![busy, asks_to_wait, good]);
    let (hub, _cache, folder) = fetched(config, weights);
    assert_eq!(content(&folder, FILE), "{}");
    assert_eq!(content(&folder, "model.safetensors"), "weights");
    assert_eq!(hub.asked("model.safetensors").len(), 3);

    let silent = Answer::Turns(vec![Raw::Stall(String::new())]);
    let (_hub, _cache, folder) = fetched(silent, large());
    let error = folder.unwrap_err().to_string();
    assert!(error.contains("no answer for 0.3 s"), "{error}");
    let patient = Answer::Turns(vec![Raw::Bytes(plain(429, "retry-after: 999\r\n", ""))]);
    let (_hub, _cache, folder) = fetched(patient, large());
    let error = folder.unwrap_err();
    assert!(
        error.to_string().contains("the hub asks to wait 999 s"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("too many requests"));
}

#[test]
fn what_was_cut_in_the_middle_goes_on() {
    let whole = format!("{}content-range: bytes 3-6/7\r\n", linked());
    let rest = Raw::Bytes(plain(206, &whole, "ghts"));
    let first = Raw::Bytes(cut(&linked(), 7, "wei"));
    let weights = Answer::Turns(vec![first.clone(), rest.clone()]);
    let (hub, cache, folder) = fetched(Answer::File("{}"), weights);
    assert_eq!(content(&folder, "model.safetensors"), "weights");
    let asked = hub.asked("model.safetensors");
    assert_eq!(asked[1].headers["range"], "bytes=3-", "{asked:?}");
    let blobs = fs::read_dir(cache.path().join("models--owner--name/blobs")).unwrap();
    for blob in blobs {
        let name = blob.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains("incomplete"), "{name}");
    }

    // a small file is resumed only if its entity tag is unchanged
    let tagged = "etag: \"v1\"\r\n";
    let rest = format!("{tagged}content-range: bytes 1-3/4\r\n");
    let config = vec![
        Raw::Bytes(cut(tagged, 4, "{")),
        Raw::Bytes(plain(206, &rest, "  }")),
    ];
    let (hub, _cache, folder) = fetched(Answer::Turns(config), large());
    assert_eq!(content(&folder, FILE), "{  }");
    assert_eq!(hub.asked(FILE)[1].headers["if-range"], "\"v1\"");
    let untagged = vec![
        Raw::Bytes(cut("", 4, "{")),
        Raw::Bytes(plain(200, "", "{ }")),
    ];
    let (hub, _cache, folder) = fetched(Answer::Turns(untagged), large());
    assert_eq!(content(&folder, FILE), "{ }");
    assert!(!hub.asked(FILE)[1].headers.contains_key("range"));
}

#[test]
fn a_later_process_goes_on_with_a_large_file() {
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--owner--name/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let partial = blobs.join(format!("{WEIGHTS_SHA256}.incomplete"));
    let fetch = |hub: &Hub| {
        resolve(
            "owner/name:gptq-4bit",
            &hub.options(&cache),
            &mut |_, _, _| {},
        )
    };
    fs::write(&partial, "weig").unwrap();
    let hub = serve(&model_routes(WEIGHTS_SHA256));
    assert_eq!(content(&fetch(&hub), "model.safetensors"), "weights");
    assert_eq!(
        hub.asked("/model.safetensors")[1].headers["range"],
        "bytes=4-"
    );

    // one that holds other bytes is found out, and the file fetched anew
    let snapshots = cache.path().join("models--owner--name/snapshots");
    fs::remove_dir_all(&snapshots).unwrap();
    fs::remove_file(blobs.join(WEIGHTS_SHA256)).unwrap();
    fs::write(&partial, "evil").unwrap();
    assert_eq!(content(&fetch(&hub), "model.safetensors"), "weights");
    assert!(!partial.exists());
}

#[test]
fn other_lengths_than_declared_are_refused() {
    let linked_size = format!("{}x-linked-size: 9\r\n", linked());
    let other = Answer::Turns(vec![Raw::Bytes(plain(200, &linked_size, "weights"))]);
    let (_hub, _cache, folder) = fetched(Answer::File("{}"), other);
    let error = folder.unwrap_err().to_string();
    assert!(
        error.contains("7 bytes were announced, but the file has 9"),
        "{error}"
    );
    let always_cut = Answer::Turns(vec![Raw::Bytes(cut("", 9, "{}"))]);
    let (_hub, cache, folder) = fetched(always_cut, large());
    let error = folder.unwrap_err().to_string();
    assert!(error.contains("gave up after 4 tries"), "{error}");
    let blobs = fs::read_dir(cache.path().join("models--owner--name/blobs")).unwrap();
    for blob in blobs {
        let name = blob.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains("incomplete"), "{name}");
    }
}

#[test]
fn a_password_in_the_address_is_used_and_not_shown() {
    // `HF_ENDPOINT=http://user:pw@host` once printed its password in every error
    let hub = Hub::with(&[("/api/models/owner/name/revision/main", Answer::Status(500))]);
    let cache = tempfile::tempdir().unwrap();
    let mut options = hub.options(&cache);
    options.endpoint = Some(hub.endpoint.replace("//", "//user:hunter2@"));
    options.patience.retries = 0;
    assert!(!format!("{options:?}").contains("hunter2"));
    let error = resolve("owner/name", &options, &mut |_, _, _| {}).unwrap_err();
    let text = format!("{error} {error:?} {:?}", error.hint());
    assert!(
        !text.contains("hunter2") && !text.contains("user:"),
        "{text}"
    );
    let asked = hub.asked("main");
    assert_eq!(asked[0].headers["authorization"], "Basic dXNlcjpodW50ZXIy");
}

#[test]
fn two_at_once_end_with_one_whole_file() {
    let hub = serve(&model_routes(WEIGHTS_SHA256));
    let cache = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let options = hub.options(&cache);
                let folder = resolve("owner/name:gptq-4bit", &options, &mut |_, _, _| {});
                assert_eq!(content(&folder, "model.safetensors"), "weights");
            });
        }
    });
}

#[test]
fn names_and_tags_of_the_hub_choose_no_path() {
    let evil = "etag: \"../../../evil\"\r\nx-repo-commit: ../../evil\r\n";
    let config = Answer::Turns(vec![Raw::Bytes(plain(200, evil, "{}"))]);
    let (_hub, cache, folder) = fetched(config, large());
    assert_eq!(content(&folder, FILE), "{}");
    for entry in fs::read_dir(cache.path()).unwrap() {
        assert_eq!(entry.unwrap().file_name(), "models--owner--name");
    }
    let sha = serde_json::json!({"sha": "../../evil", "siblings": []}).to_string();
    let error = failure(&[("/api/models/owner/name/revision/main", Answer::Json(sha))]);
    assert!(
        error.to_string().contains("`../../evil` is not a commit"),
        "{error}"
    );
}

#[test]
fn an_adapter_on_the_hub_is_named_with_its_base() {
    let api = "/api/models/owner/name/revision/main";
    let config = format!("/owner/name/resolve/{COMMIT}/adapter_config.json");
    let adapter = Answer::File("{\"base_model_name_or_path\": \"acme/base\"}");
    let names = info(&["adapter_config.json", "adapter_model.bin"]);
    let error = failure(&[(api, names), (&config, adapter)]);
    let text = error.to_string();
    assert_eq!(
        text,
        "`owner/name:main` is an adapter of `acme/base`, not a model"
    );
}
