//! The help texts, as they are committed in `help.txt`, and README's command lines against them.
//!
//! `SPARGE_UPDATE_HELP=1` rewrites the file: a change of the help is then seen where README can be
//! changed with it.

#![expect(clippy::disallowed_methods, reason = "tests are configured by the environment")]

mod common;

use common::*;

const COMMITTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/help.txt");
const README: &str = include_str!("../../../README.md");
/// What every subcommand has alike; shown once, at the top.
const GLOBAL: &str = "\nGlobal options:\n";

/// The help of `path` and of every subcommand below it, each under the command that prints it.
fn helps(path: &[&str]) -> Vec<(String, String)> {
    let output = command().env_remove("SPARGE_THREADS").args(path).arg("--help").output();
    let help = ran(&output.expect("starts")).ok().stdout.clone();
    let commands = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest);
    let names = commands.lines().map_while(|line| line.strip_prefix("  ")?.split(' ').next());
    let below: Vec<_> = names
        .filter(|name| *name != "help")
        .flat_map(|name| helps(&[path, &[name]].concat()))
        .collect();
    let own =
        if path.is_empty() { &help[..] } else { help.split(GLOBAL).next().unwrap_or_default() };
    let title = [&["sparge"], path].concat().join(" ");
    // clap indents empty lines; editors take that away.
    let own = own.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    std::iter::once((title, own)).chain(below).collect()
}

#[test]
fn help_is_what_is_committed() {
    let helps = helps(&[]);
    let text: String =
        helps.iter().map(|(title, help)| format!("$ {title} --help\n\n{help}\n")).collect();
    if std::env::var("SPARGE_UPDATE_HELP").as_deref() == Ok("1") {
        std::fs::write(COMMITTED, &text).expect("written");
    }
    let committed = std::fs::read_to_string(COMMITTED).unwrap_or_default().replace("\r\n", "\n");
    let different = committed.lines().zip(text.lines()).find(|(a, b)| a != b);
    assert!(
        committed == text,
        "help.txt is not what the command says, first at {different:?}; SPARGE_UPDATE_HELP=1 rewrites it"
    );
}

#[test]
fn readme_uses_flags_that_there_are() {
    let helps = helps(&[]);
    let global = &helps[0].1;
    let lines = README.lines().filter_map(|line| line.strip_prefix("    sparge "));
    let lines: Vec<_> = lines.map(|line| line.split(" # ").next().unwrap_or_default()).collect();
    assert!(lines.len() > 10, "{lines:?}");
    for line in lines.iter().flat_map(|line| line.split(';')) {
        let line = format!("sparge {}", line.trim().trim_start_matches("sparge "));
        let of = |title: &str| line == title || line.starts_with(&format!("{title} "));
        // The longest name that fits: `sparge eval` fits `sparge eval ppl` too.
        let help = helps.iter().filter(|(title, _)| of(title)).max_by_key(|(title, _)| title.len());
        let (title, help) = help.expect("sparge itself fits");
        assert_ne!(title, "sparge", "no such subcommand: {line}");
        for flag in line.split_whitespace().filter(|word| word.starts_with("--")) {
            let known = |help: &str| help.split([' ', '\n', ',']).any(|word| word == flag);
            assert!(known(help) || known(global), "README: no {flag} in {title} --help: {line}");
        }
    }
}
