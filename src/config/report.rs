//! What is said about a configuration: its problems, or its effective values.

use std::fmt;
use std::path::PathBuf;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A configuration file.
    File(PathBuf),
    /// An environment variable.
    Variable(String),
    /// The command line.
    CommandLine,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Variable(name) => f.write_str(name),
            Origin::CommandLine => f.write_str("command line"),
        }
    }
}

/// One thing that is wrong, told on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key (with the position, for one item of a list), or the file that cannot be read.
    pub subject: String,
    /// The value as it may be shown.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: Option<Origin>,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.subject)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        if let Some(origin) = &self.origin {
            write!(f, " ({origin})")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Everything that is wrong with a configuration. Never shows a whole RPC URL.
#[derive(Debug, thiserror::Error)]
#[error("{}", render(.problems))]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<Problem>,
}

fn render(problems: &[Problem]) -> String {
    let mut text = match problems.len() {
        1 => "1 problem in the configuration:".to_owned(),
        n => format!("{n} problems in the configuration:"),
    };
    for problem in problems {
        text.push_str(&format!("\n  {problem}"));
    }
    text
}

/// One key with its effective value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The key's path, such as `chain.id`.
    pub key: &'static str,
    /// The value as it would be written in the file, secrets hidden; a list has one line per item; empty if not set.
    pub value: Vec<String>,
    /// Where the value came from.
    pub source: String,
}

/// Every key with its effective value and where that came from, secrets hidden.
///
/// `Display` is an aligned table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// In the order of the documentation.
    pub rows: Vec<Row>,
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |cell: fn(&Row) -> &str| {
            let widths = self.rows.iter().map(|row| cell(row).chars().count());
            widths.max().unwrap_or(0)
        };
        let keys = width(|row| row.key);
        let sources = width(|row| &row.source);
        // The value stands last: signatures are too long for a column in the middle.
        for row in &self.rows {
            let (first, rest) = match row.value.split_first() {
                Some((first, rest)) => (first.as_str(), rest),
                None => ("(not set)", [].as_slice()),
            };
            writeln!(f, "{:keys$}  {:sources$}  {first}", row.key, row.source)?;
            for item in rest {
                writeln!(f, "{:keys$}  {:sources$}  {item}", "", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_problem_after_a_line_that_counts_them() {
        let problem = Problem {
            subject: "chain.id".to_owned(),
            value: Some("\"x\"".to_owned()),
            origin: Some(Origin::Variable("CHAIN_ID".to_owned())),
            reason: "must be a number".to_owned(),
        };
        let error = ConfigError { problems: vec![problem.clone(), problem] };
        let line = "  chain.id = \"x\" (CHAIN_ID): must be a number";
        assert_eq!(error.to_string(), format!("2 problems in the configuration:\n{line}\n{line}"));
    }

    #[test]
    fn the_effective_values_are_an_aligned_table() {
        let row = |key, value: &[&str], source: &str| Row {
            key,
            value: value.iter().map(|&line| line.to_owned()).collect(),
            source: source.to_owned(),
        };
        let effective = Effective {
            rows: vec![
                row("a.b", &["1"], "default"),
                row("a.long", &["\"x\"", "\"y\""], "FILE"),
                row("c.d", &[], "default"),
            ],
        };
        assert_eq!(
            effective.to_string(),
            "a.b     default  1\n\
             a.long  FILE     \"x\"\n                 \"y\"\n\
             c.d     default  (not set)\n"
        );
    }
}
