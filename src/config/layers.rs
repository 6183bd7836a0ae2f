//! The layers of the configuration, later over earlier: built-in defaults, file, the plain variables,
//! `RELAYER_<SECTION>__<KEY>` variables, command line.

use std::path::PathBuf;

use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Num, Value};
use figment::{Figment, Metadata, Profile, Provider, Source};

use super::Sources;
use super::keys::{KEYS, Key, Shape};
use super::report::{Origin, Problem};
use super::secret;

const PREFIX: &str = "RELAYER_";
const FILE_NAME: &str = "relayer.toml";

/// A value as it was given, before its key's parser has looked at it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Integer(i128),
    Float(f64),
    Bool(bool),
    List(Vec<Raw>),
    Table,
}

impl Raw {
    fn of(value: &Value) -> Raw {
        match value {
            Value::String(_, text) => Raw::Text(text.clone()),
            Value::Char(_, c) => Raw::Text(c.to_string()),
            Value::Bool(_, b) => Raw::Bool(*b),
            Value::Num(_, Num::F32(x)) => Raw::Float(f64::from(*x)),
            Value::Num(_, Num::F64(x)) => Raw::Float(*x),
            // figment's TOML knows no integer wider than 64 bits.
            Value::Num(..) => Raw::Integer(value.to_i128().unwrap_or(i128::MAX)),
            Value::Array(_, items) => Raw::List(items.iter().map(Raw::of).collect()),
            Value::Empty(..) | Value::Dict(..) => Raw::Table,
        }
    }

    /// A variable or the command line has only text: it is read as its key wants it. What does not fit stays
    /// text, for the key's parser to refuse.
    fn from_text(text: &str, shape: Shape) -> Raw {
        let text = text.trim();
        match shape {
            Shape::Text => Raw::Text(text.to_owned()),
            Shape::Number => match text.replace('_', "").parse() {
                Ok(number) => Raw::Integer(number),
                Err(_) => Raw::Text(text.to_owned()),
            },
            Shape::List if text.starts_with('[') => match toml(&format!("list = {text}")) {
                Ok(dict) => dict.get("list").map_or_else(|| Raw::Text(text.to_owned()), Raw::of),
                Err(_) => Raw::Text(text.to_owned()),
            },
            Shape::List => Raw::List(
                split_outside_parentheses(text).into_iter().map(|item| Raw::Text(item.to_owned())).collect(),
            ),
        }
    }

    /// The text of a scalar; numbers count, so that `project = 12345` works.
    pub(super) fn text(&self) -> Option<String> {
        match self {
            Raw::Text(text) => Some(text.trim().to_owned()),
            Raw::Integer(number) => Some(number.to_string()),
            Raw::Float(number) => Some(number.to_string()),
            Raw::Bool(value) => Some(value.to_string()),
            Raw::List(_) | Raw::Table => None,
        }
    }

    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Raw::Text(_) => "a string",
            Raw::Integer(_) => "a whole number",
            Raw::Float(_) => "a fraction",
            Raw::Bool(_) => "a boolean",
            Raw::List(_) => "a list",
            Raw::Table => "a table",
        }
    }

    /// The value as it would stand in the file, on one line, with URLs hidden. `secret` says that it is or should
    /// be a URL; in another place a URL is known by its `://`.
    pub(super) fn shown(&self, secret: bool) -> String {
        match self {
            Raw::Text(text) if secret || text.contains("://") => {
                format!("\"{}\"", secret::hide(text.trim()))
            }
            Raw::Text(text) => format!("{text:?}"),
            Raw::Integer(number) => number.to_string(),
            Raw::Float(number) => number.to_string(),
            Raw::Bool(value) => value.to_string(),
            Raw::List(items) => {
                let items: Vec<_> = items.iter().map(|item| item.shown(secret)).collect();
                format!("[{}]", items.join(", "))
            }
            Raw::Table => "{…}".to_owned(),
        }
    }
}

/// A key's effective value, not yet parsed.
pub(super) struct Given {
    /// As it was written, for messages.
    pub written: Raw,
    /// As its parser wants it; an error if its variable's own form is wrong.
    pub value: Result<Raw, String>,
    pub origin: Origin,
}

/// All layers merged.
pub(super) struct Layers {
    figment: Figment,
    /// False if the file could not be read: then nothing can be said about what is missing.
    pub complete: bool,
}

impl Layers {
    /// Gathers every source; what is wrong with them goes to `problems`.
    pub fn gather(sources: &Sources, problems: &mut Vec<Problem>) -> Layers {
        let mut settings = defaults();
        let complete = match file(sources) {
            Ok(None) => true,
            Ok(Some((path, dict))) => {
                let origin = Origin::File(path);
                flatten(&dict, "", &origin, &mut settings, problems);
                true
            }
            Err(problem) => {
                problems.push(problem);
                false
            }
        };
        settings.extend(plan_variables(sources));
        named_variables(sources, &mut settings, problems);
        overrides(sources, &mut settings, problems);

        let merge = |figment: Figment, setting| figment.merge(setting);
        let figment = settings.into_iter().fold(Figment::new(), merge);
        Layers { figment, complete }
    }

    /// The effective value of `key`, if any layer has one.
    pub fn given(&self, key: &Key) -> Option<Given> {
        let value = self.figment.find_value(key.path).ok()?;
        let origin = self.figment.get_metadata(value.tag()).map_or(Origin::Default, origin_of);
        let given = match &origin {
            Origin::Default | Origin::File(_) => {
                let raw = Raw::of(&value);
                (raw.clone(), Ok(raw))
            }
            Origin::Variable(_) | Origin::CommandLine => {
                let text = value.as_str().unwrap_or_default();
                (
                    Raw::from_text(text, key.shape),
                    key.rewritten(text, &origin).map(|text| Raw::from_text(&text, key.shape)),
                )
            }
        };
        let (written, value) = given;
        Some(Given { written, value, origin })
    }
}

/// One key's value in one layer. Each is its own figment provider, so that figment's provenance names the variable.
struct Setting {
    path: &'static str,
    value: Value,
    origin: Origin,
}

impl Provider for Setting {
    fn metadata(&self) -> Metadata {
        match &self.origin {
            Origin::Default => Metadata::named(DEFAULT),
            Origin::File(path) => Metadata::from("file", path.as_path()),
            Origin::Variable(name) => Metadata::from("variable", name.clone()),
            Origin::CommandLine => Metadata::named(COMMAND_LINE),
        }
    }

    fn data(&self) -> figment::Result<Map<Profile, Dict>> {
        match figment::util::nest(self.path, self.value.clone()) {
            Value::Dict(_, dict) => Ok(Profile::Default.collect(dict)),
            _ => Err(figment::Error::from(format!("{} has no section", self.path))),
        }
    }
}

const DEFAULT: &str = "default";
const COMMAND_LINE: &str = "command line";

/// The inverse of [`Setting::metadata`].
fn origin_of(metadata: &Metadata) -> Origin {
    match &metadata.source {
        Some(Source::File(path)) => Origin::File(path.clone()),
        Some(Source::Custom(name)) => Origin::Variable(name.clone()),
        _ if metadata.name == COMMAND_LINE => Origin::CommandLine,
        _ => Origin::Default,
    }
}

fn defaults() -> Vec<Setting> {
    let settings = KEYS.iter().filter_map(|key| {
        Some(Setting { path: key.path, value: key.default_value()?, origin: Origin::Default })
    });
    settings.collect()
}

fn file(sources: &Sources) -> Result<Option<(PathBuf, Dict)>, Problem> {
    let (shown, path) = match &sources.file {
        Some(path) => (path.clone(), sources.directory.join(path)),
        None => (PathBuf::from(FILE_NAME), sources.directory.join(FILE_NAME)),
    };
    let problem =
        |reason| Problem { subject: shown.display().to_string(), value: None, origin: None, reason };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && sources.file.is_none() => {
            return Ok(None);
        }
        Err(error) => {
            return Err(problem(format!("the configuration file cannot be read: {error}")));
        }
    };
    match toml(&text) {
        Ok(dict) => Ok(Some((shown, dict))),
        Err(reason) => Err(problem(reason)),
    }
}

/// Parses TOML. The library's message quotes the line at fault, which may hold a URL: only where and why are kept.
pub(super) fn toml(text: &str) -> Result<Dict, String> {
    let error = match Toml::string(text).data() {
        Ok(mut profiles) => return Ok(profiles.remove(&Profile::Default).unwrap_or_default()),
        Err(error) => error.to_string(),
    };
    let place = error.lines().next().unwrap_or_default();
    let why = error.lines().map(str::trim).rfind(|line| !line.is_empty());
    let why = match why {
        Some(why) if why != place && !why.contains("://") && !why.starts_with('|') => why,
        _ => "not valid TOML",
    };
    let place = match place.find("line ") {
        Some(at) if !place.contains("://") => &place[at..],
        _ => "somewhere",
    };
    Err(format!("not valid TOML at {place}: {why}"))
}

/// Turns the file's tables into settings, and unknown keys into problems.
fn flatten(
    dict: &Dict,
    prefix: &str,
    origin: &Origin,
    settings: &mut Vec<Setting>,
    problems: &mut Vec<Problem>,
) {
    for (name, value) in dict {
        let path = format!("{prefix}{name}");
        if let Some(key) = find(&path) {
            settings.push(Setting { path: key.path, value: value.clone(), origin: origin.clone() });
            continue;
        }
        match value {
            Value::Dict(_, inner) if !inner.is_empty() || is_section(&path) => {
                flatten(inner, &format!("{path}."), origin, settings, problems);
            }
            _ if is_section(&path) => problems.push(Problem {
                subject: path.clone(),
                value: None,
                origin: Some(origin.clone()),
                reason: format!("{path} is a section, not a key: write [{path}]"),
            }),
            _ => problems.push(unknown(&path, &Raw::of(value), origin)),
        }
    }
}

fn plan_variables(sources: &Sources) -> Vec<Setting> {
    let settings = KEYS.iter().filter_map(|key| {
        let name = key.plain.as_ref()?.variable;
        let text = sources.environment.get(name)?;
        (!text.trim().is_empty()).then(|| Setting {
            path: key.path,
            value: Value::from(text.as_str()),
            origin: Origin::Variable(name.to_owned()),
        })
    });
    settings.collect()
}

/// Only names with `__` are ours: Kubernetes injects `RELAYER_PORT=tcp://…` for a service named relayer.
pub(super) fn is_named_variable(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.contains("__"))
}

fn named_variables(sources: &Sources, settings: &mut Vec<Setting>, problems: &mut Vec<Problem>) {
    for (name, text) in &sources.environment {
        if !is_named_variable(name) {
            continue;
        }
        let path = name[PREFIX.len()..].to_lowercase().replace("__", ".");
        let origin = Origin::Variable(name.clone());
        add(&path, text, origin, settings, problems);
    }
}

fn overrides(sources: &Sources, settings: &mut Vec<Setting>, problems: &mut Vec<Problem>) {
    for (path, text) in &sources.overrides {
        add(path, text, Origin::CommandLine, settings, problems);
    }
}

fn add(path: &str, text: &str, origin: Origin, settings: &mut Vec<Setting>, problems: &mut Vec<Problem>) {
    match find(path) {
        Some(key) => settings.push(Setting { path: key.path, value: Value::from(text), origin }),
        None => problems.push(unknown(path, &Raw::Text(text.to_owned()), &origin)),
    }
}

fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path).copied()
}

fn is_section(path: &str) -> bool {
    KEYS.iter().any(|key| key.section() == path)
}

fn unknown(path: &str, raw: &Raw, origin: &Origin) -> Problem {
    let meant = nearest(path);
    let reason = match (meant, origin) {
        (Some(key), Origin::Variable(_)) => {
            format!("unknown key; did you mean {}?", key.variable())
        }
        (Some(key), Origin::Default | Origin::File(_) | Origin::CommandLine) => {
            format!("unknown key; did you mean {}?", key.path)
        }
        (None, _) => "unknown key; `relayer config` lists the keys there are".to_owned(),
    };
    let value = match meant {
        Some(key) if key.secret => None,
        _ => harmless(raw),
    };
    Problem { subject: path.to_owned(), value, origin: Some(origin.clone()), reason }
}

/// Nobody knows what stands under an unknown key; it may be a URL or a token. So only what cannot be one is shown.
fn harmless(raw: &Raw) -> Option<String> {
    match raw {
        Raw::Integer(_) | Raw::Float(_) | Raw::Bool(_) => Some(raw.shown(false)),
        Raw::Text(text) if text.len() <= 12 && !text.contains(['/', '@']) => Some(raw.shown(false)),
        Raw::Text(_) | Raw::List(_) | Raw::Table => None,
    }
}

/// The known key that was probably meant: the same name in another section, or a few letters off.
fn nearest(path: &str) -> Option<&'static Key> {
    let path = path.to_lowercase();
    let name = path.rsplit('.').next().unwrap_or(&path);
    let similarity = |key: &Key| {
        let whole = strsim::normalized_damerau_levenshtein(&path, key.path);
        let last = strsim::normalized_damerau_levenshtein(name, key.name());
        // A name that only resembles, in another section, is a worse guess than the whole that resembles.
        whole.max(last * 0.9)
    };
    let scored = KEYS.iter().map(|&key| (similarity(key), key));
    scored.filter(|(score, _)| *score >= 0.65).max_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, key)| key)
}

/// Signatures contain commas: only those outside parentheses separate.
fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let pieces = text.split(|c| {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        c == ',' && depth == 0
    });
    pieces.map(str::trim).filter(|piece| !piece.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_as_its_key_wants_it() {
        let texts =
            |items: &[&str]| Raw::List(items.iter().map(|&item| Raw::Text(item.to_owned())).collect());
        for (text, shape, raw) in [
            (" 12 ", Shape::Number, Raw::Integer(12)),
            ("9_508_300", Shape::Number, Raw::Integer(9_508_300)),
            ("twelve", Shape::Number, Raw::Text("twelve".to_owned())),
            ("12345", Shape::Text, Raw::Text("12345".to_owned())),
            ("a, b,", Shape::List, texts(&["a", "b"])),
            (r#"["a","b"]"#, Shape::List, texts(&["a", "b"])),
            ("['a']", Shape::List, texts(&["a"])),
            ("[a", Shape::List, Raw::Text("[a".to_owned())),
            ("", Shape::List, texts(&[])),
            (
                "A(address x, uint256 y), B((uint8,uint8) z)",
                Shape::List,
                texts(&["A(address x, uint256 y)", "B((uint8,uint8) z)"]),
            ),
        ] {
            assert_eq!(Raw::from_text(text, shape), raw, "{text}");
        }
    }

    #[test]
    fn the_key_that_was_meant_is_guessed() {
        for (path, meant) in [
            ("rpc.url", Some("rpc.urls")),
            ("chian.id", Some("chain.id")),
            ("chain.start_blok", Some("chain.start_block")),
            ("rpc.start_block", Some("chain.start_block")),
            ("max_range", Some("rpc.max_range")),
            ("sink.project_id", Some("sink.project")),
            ("Chain.Id", Some("chain.id")),
            ("weather.forecast", None),
        ] {
            assert_eq!(nearest(path).map(|key| key.path), meant, "{path}");
        }
    }

    #[test]
    fn a_syntax_error_names_its_place_and_not_the_line() {
        let reason = toml("[rpc]\nurls = [\"https://rpc.example/KEY\" \"x\"]").unwrap_err();
        assert!(reason.contains("line 2"), "{reason}");
        assert!(!reason.contains("rpc.example") && !reason.contains('\n'), "{reason}");
    }
}
