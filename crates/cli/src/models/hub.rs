//! Models of Hugging Face repositories, in the cache that other tools share (`$HF_HOME`, default
//! `~/.cache/huggingface`). `HF_ENDPOINT` names another server than huggingface.co.

use super::progress;
use anyhow::{Context, Result, bail, ensure};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::{Path, PathBuf};

/// What a model folder may hold besides its weights.
const COMPANIONS: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// What to fetch of a repository.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// One file that is a model.
    Gguf(String),
    /// The files of a model folder.
    Folder(Vec<String>),
}

/// The path of a repository's model: a `.gguf` file or a folder. Fetches what is missing.
pub async fn get(repo: String, file: Option<String>) -> Result<PathBuf> {
    let fetch = move || fetch(&repo, file.as_deref());
    tokio::task::spawn_blocking(fetch)
        .await
        .context("the download ended early")?
}

fn fetch(name: &str, file: Option<&str>) -> Result<PathBuf> {
    let api = ApiBuilder::from_env()
        .with_progress(false)
        .with_retries(2)
        .build()
        .context("prepare the download")?;
    let cache = Cache::from_env();
    let info = match api.model(name.to_owned()).info() {
        Ok(info) => info,
        Err(error) => {
            let Some(path) = cached(&cache, name, file) else {
                return Err(explained(name, error));
            };
            eprintln!("baton: the hub does not answer; using {name} as it was fetched before");
            return Ok(path);
        }
    };
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let choice = choose(name, &names, file)?;
    // All files of one commit, whatever is pushed meanwhile.
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, info.sha.clone());
    let remote = api.repo(repo.clone());
    let get = |file: &String| match cache.repo(repo.clone()).get(file) {
        Some(path) => Ok(path),
        None => download(&remote, name, file),
    };
    let path = match &choice {
        Choice::Gguf(file) => get(file)?,
        Choice::Folder(files) => {
            let paths = files.iter().map(get).collect::<Result<Vec<_>>>()?;
            let first = paths.first().and_then(|path| path.parent());
            first.with_context(|| format!("{name} has no files"))?.to_owned()
        }
    };
    // The branch's name is written last: what it points to is whole, and is found without the hub.
    cache
        .model(name.to_owned())
        .create_ref(&info.sha)
        .context("write the cache")?;
    Ok(path)
}

/// What was fetched whole before.
fn cached(cache: &Cache, name: &str, file: Option<&str>) -> Option<PathBuf> {
    let repo = cache.model(name.to_owned());
    if let Some(file) = file {
        return repo.get(file);
    }
    let folder = repo.get("");
    let files = std::fs::read_dir(folder.as_deref()?).ok()?.flatten();
    let names: Vec<String> = files.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    match choose(name, &names, None).ok()? {
        Choice::Gguf(file) => repo.get(&file),
        Choice::Folder(_) => folder,
    }
}

fn choose(name: &str, files: &[String], wanted: Option<&str>) -> Result<Choice> {
    let with_end = |end: &str| -> Vec<String> { files.iter().filter(|file| file.ends_with(end)).cloned().collect() };
    if let Some(wanted) = wanted {
        ensure!(
            files.iter().any(|file| file == wanted),
            "{name} has no file `{wanted}`; it has: {}",
            files.join(", ")
        );
        ensure!(
            wanted.ends_with(".gguf"),
            "{wanted} is no model: name a .gguf file, or {name} alone"
        );
        return Ok(Choice::Gguf(wanted.to_owned()));
    }
    let ggufs = with_end(".gguf");
    if let [one] = ggufs.as_slice() {
        return Ok(Choice::Gguf(one.clone()));
    }
    let mut weights = with_end(".safetensors");
    weights.retain(|file| !file.contains('/'));
    if weights.iter().any(|file| file == "model.safetensors") {
        weights.retain(|file| file == "model.safetensors");
    }
    if weights.is_empty() {
        ensure!(!ggufs.is_empty(), "{name} has neither .gguf nor .safetensors files");
        bail!(
            "{name} has several models; name one, such as {name}/{}\nIt has: {}",
            ggufs[0],
            ggufs.join(", ")
        );
    }
    for needed in ["config.json", "tokenizer.json"] {
        ensure!(
            files.iter().any(|file| file == needed),
            "{name} has no {needed}, which is needed beside its weights"
        );
    }
    let companions = files.iter().filter(|file| COMPANIONS.contains(&file.as_str())).cloned();
    Ok(Choice::Folder(companions.chain(weights).collect()))
}

fn download(remote: &ApiRepo, name: &str, file: &str) -> Result<PathBuf> {
    let path = remote
        .download_with_progress(file, Bar::new(file))
        .map_err(|error| explained(name, error))?;
    // The hub names the content of a large file by its SHA-256, and the cache names the file after it.
    let blob = std::fs::canonicalize(&path).with_context(|| format!("find {}", path.display()))?;
    let expected = blob
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
        .to_owned();
    if expected.len() == 64 && expected.bytes().all(|b| b.is_ascii_hexdigit()) {
        let found = sha256(&blob)?;
        if found != expected {
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_file(&blob);
            bail!("{file} of {name} has SHA-256 {found}, expected {expected}: it was not kept; run the command again");
        }
    }
    Ok(path)
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file
            .read(&mut buffer)
            .with_context(|| format!("read {}", path.display()))?;
        if read == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

fn explained(name: &str, error: ApiError) -> anyhow::Error {
    let text = error.to_string();
    let remedy =
        if text.contains("status code 401") || text.contains("status code 403") || text.contains("status code 404") {
            "there is no such repository, or it needs a login (`huggingface-cli login`)"
        } else {
            "is the hub reachable from here? HF_ENDPOINT names a mirror; a model that you have works too: --model PATH"
        };
    anyhow::Error::new(error).context(format!("cannot fetch {name}: {remedy}"))
}

/// hf-hub's progress on our bar.
struct Bar {
    file: String,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn new(file: &str) -> Self {
        Self {
            file: file.to_owned(),
            bar: None,
        }
    }
}

impl hf_hub::api::Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        match &self.bar {
            // A retry starts over with what is there.
            Some(bar) => bar.set_position(0),
            None => self.bar = Some(progress::bytes(&format!("fetching {}", self.file), size as u64)),
        }
    }

    fn update(&mut self, size: usize) {
        if let Some(bar) = &self.bar {
            bar.inc(size as u64);
        }
    }

    fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn chooses_what_is_a_model() {
        let one = files(&["README.md", "a.Q4_0.gguf"]);
        assert_eq!(
            choose("o/n", &one, None).unwrap(),
            Choice::Gguf("a.Q4_0.gguf".to_owned())
        );
        let folder = files(&[
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "onnx/x.safetensors",
            "LICENSE",
        ]);
        let wanted = files(&["config.json", "tokenizer.json", "model.safetensors"]);
        assert_eq!(choose("o/n", &folder, None).unwrap(), Choice::Folder(wanted));
        let many = files(&["a.gguf", "b.gguf"]);
        let error = choose("o/n", &many, None).unwrap_err().to_string();
        assert!(error.contains("o/n/a.gguf"), "{error}");
        assert_eq!(
            choose("o/n", &many, Some("b.gguf")).unwrap(),
            Choice::Gguf("b.gguf".to_owned())
        );
        assert!(
            choose("o/n", &many, Some("c.gguf"))
                .unwrap_err()
                .to_string()
                .contains("no file `c.gguf`")
        );
        let bare = files(&["config.json", "model.safetensors"]);
        assert!(
            choose("o/n", &bare, None)
                .unwrap_err()
                .to_string()
                .contains("no tokenizer.json")
        );
        assert!(
            choose("o/n", &files(&["x.bin"]), None)
                .unwrap_err()
                .to_string()
                .contains("neither")
        );
    }
}
