//! What a `--model` value names, and the path that it comes to.

use super::{cache, hub, smollm2};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A parsed `--model` value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The scripted engine; the text goes to the node as it is.
    Stub(String),
    /// The small model that Baton knows by name.
    SmolLm2,
    /// A GGUF file or a folder in Hugging Face's layout.
    Path(PathBuf),
    /// A Hugging Face repository, and maybe one file in it.
    Hub {
        /// `owner/name`.
        repo: String,
        /// A file of it.
        file: Option<String>,
    },
}

impl FromStr for ModelSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "stub" || text.starts_with("stub:") {
            return Ok(Self::Stub(text.to_owned()));
        }
        let path = Path::new(text);
        if path.exists() {
            return Ok(Self::Path(path.to_owned()));
        }
        if text == "smollm2" {
            return Ok(Self::SmolLm2);
        }
        if text.starts_with(['.', '/', '~']) {
            return Err(format!("there is no file or folder `{text}`"));
        }
        let parts: Vec<&str> = text.splitn(3, '/').collect();
        let is_name = |part: &&str| {
            !part.is_empty()
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        };
        match parts.as_slice() {
            [owner, name, rest @ ..] if parts.iter().all(is_name) && !text.contains("..") => {
                if rest.is_empty() && name.ends_with(".gguf") {
                    return Err(format!("there is no file `{text}`"));
                }
                Ok(Self::Hub {
                    repo: format!("{owner}/{name}"),
                    file: rest.first().map(|file| (*file).to_owned()),
                })
            }
            _ => Err(format!(
                "`{text}` is no model: expected smollm2, a .gguf file, a folder with config.json and *.safetensors, or a \
                 Hugging Face repository such as Qwen/Qwen3-0.6B"
            )),
        }
    }
}

impl ModelSource {
    /// A scripted engine, not a model.
    pub fn is_stub(&self) -> bool {
        matches!(self, Self::Stub(_))
    }

    /// The `--model` value for a node: a path that exists, or the stub's text. Fetches what is missing, with progress on
    /// standard error; dropping the future stops that and leaves nothing half done in the cache.
    pub async fn resolve(&self) -> Result<String> {
        let path = match self {
            Self::Stub(text) => return Ok(text.clone()),
            Self::Path(path) => std::fs::canonicalize(path).with_context(|| format!("find {}", path.display()))?,
            Self::SmolLm2 => smollm2::get(&cache::folder()?).await?,
            Self::Hub { repo, file } => hub::get(repo.clone(), file.clone()).await?,
        };
        match path.into_os_string().into_string() {
            Ok(text) => Ok(text),
            Err(path) => bail!("the path {} is not valid UTF-8: move the model", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_sources_apart() {
        assert_eq!("stub:vocab=9".parse(), Ok(ModelSource::Stub("stub:vocab=9".to_owned())));
        assert_eq!("smollm2".parse(), Ok(ModelSource::SmolLm2));
        assert_eq!(".".parse(), Ok(ModelSource::Path(".".into())));
        let repo = "Qwen/Qwen3-0.6B".to_owned();
        assert_eq!(
            "Qwen/Qwen3-0.6B".parse(),
            Ok(ModelSource::Hub {
                repo: repo.clone(),
                file: None
            })
        );
        let file = Some("q/model-q4_0.gguf".to_owned());
        assert_eq!(
            "Qwen/Qwen3-0.6B/q/model-q4_0.gguf".parse(),
            Ok(ModelSource::Hub { repo, file })
        );
        for bad in [
            "./nowhere.gguf",
            "/nowhere",
            "nonsense",
            "",
            "a/",
            "a/b c",
            "models/x.gguf",
            "a/../b",
        ] {
            let error = bad.parse::<ModelSource>().unwrap_err();
            assert!(error.contains("no "), "{bad}: {error}");
        }
    }

    #[tokio::test]
    async fn a_path_becomes_absolute() {
        let path = "src".parse::<ModelSource>().unwrap().resolve().await.unwrap();
        assert!(path.starts_with('/') && path.ends_with("/src"), "{path}");
        assert_eq!("stub".parse::<ModelSource>().unwrap().resolve().await.unwrap(), "stub");
    }
}
