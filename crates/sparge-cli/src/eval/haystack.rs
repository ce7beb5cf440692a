//! Texts with sentences hidden in them, and what to ask about one of them.
//!
//! One sentence: the classic needle. Several: RULER's multi-key retrieval, where the others differ
//! in their key alone, among a text or among nothing but such sentences.

use crate::error::{Error, Result};
use clap::ValueEnum;
use sparge_candle::{Message, Tokenizer};

const CITIES: [&str; 8] =
    ["Lisbon", "Nairobi", "Kyoto", "Bogota", "Tallinn", "Perth", "Montreal", "Jaipur"];
const ADJECTIVES: [&str; 24] = [
    "amber", "brave", "calm", "dusty", "eager", "faint", "gentle", "hollow", "idle", "jolly",
    "keen", "lively", "mellow", "narrow", "odd", "plain", "quiet", "rapid", "silent", "tidy",
    "upper", "vivid", "warm", "young",
];
const NOUNS: [&str; 32] = [
    "anchor", "basket", "candle", "desert", "engine", "forest", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "mirror", "needle", "orchard", "pencil", "quarry", "river",
    "saddle", "tunnel", "umbrella", "valley", "window", "yard", "bridge", "carpet", "drawer",
    "feather", "hammer", "lantern", "meadow", "pillow",
];
/// Keys there are.
const KEYS: usize = ADJECTIVES.len() * NOUNS.len();

/// `--haystack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Hay {
    /// The text, with as many sentences hidden in it as there are keys
    Text,
    /// Only such sentences, as many as fit
    Needles,
}

/// A key and its number.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Needle {
    key: String,
    number: String,
}

impl Needle {
    /// The same for the same `index`; keys repeat, numbers do not.
    fn new(index: usize, many: bool) -> Self {
        let key = if many {
            // 37 shares no factor with either count: neighbours differ in both words.
            let at = index * 37 % KEYS;
            format!("{} {}", ADJECTIVES[at % ADJECTIVES.len()], NOUNS[at / ADJECTIVES.len()])
        } else {
            CITIES[index % CITIES.len()].to_owned()
        };
        let number = 10_000 + (index as u64 + 1).wrapping_mul(48_271) % 90_000;
        Self { key, number: number.to_string() }
    }

    fn sentence(&self) -> String {
        format!(" The special magic number for {} is {}. ", self.key, self.number)
    }

    fn question(&self) -> String {
        format!("What is the special magic number for {}? Answer with the number.", self.key)
    }
}

/// What is hidden, and which of it is asked for.
#[derive(Debug)]
pub(super) struct Task {
    asked: Needle,
    others: Vec<Needle>,
    hay: Hay,
    index: usize,
}

impl Task {
    /// The `index`-th task with `keys` sentences; the same for the same index.
    pub(super) fn new(index: usize, keys: usize, hay: Hay) -> Self {
        let many = keys > 1 || hay == Hay::Needles;
        // Tasks next to each other share no key.
        let first = index * if many { 101 } else { 1 };
        Self {
            asked: Needle::new(first, many),
            others: (1..keys).map(|i| Needle::new(first + i, many)).collect(),
            hay,
            index,
        }
    }

    /// The right answer.
    pub(super) fn number(&self) -> &str {
        &self.asked.number
    }

    /// A conversation of about `length` tokens, and never more, with the sentence asked for at
    /// `depth` (0 the start, 1 the end).
    pub(super) fn prompt(
        &self,
        tokenizer: &Tokenizer,
        text: &[u32],
        length: usize,
        depth: f64,
    ) -> Result<Vec<u32>> {
        let ask = |hay: &str| -> Result<Vec<u32>> {
            let content = format!("{hay}\n\n{}", self.asked.question());
            let messages = [Message { role: "user".into(), content }];
            Ok(tokenizer.encode(&tokenizer.chat(&messages)?)?)
        };
        let hidden: String =
            std::iter::once(&self.asked).chain(&self.others).map(Needle::sentence).collect();
        // Tokens merge differently where texts meet: leave a little room for each place.
        let around = ask(&hidden)?.len() + 8 + 4 * self.others.len();
        let room = length.checked_sub(around).filter(|&room| room > 0).ok_or_else(|| {
            Error::input(format!(
                "a context of {length} tokens has no room beside the question and its sentences \
                 ({around}); use a longer one or fewer keys"
            ))
        })?;
        let hay = match self.hay {
            Hay::Text => self.among(&tokenizer.decode(&text[..room.min(text.len())])?, depth),
            Hay::Needles => {
                let each = tokenizer.encode(&self.asked.sentence())?.len() + 1;
                self.only(room / each, depth)
            }
        };
        let tokens = ask(&hay)?;
        if tokens.len() > length {
            return Err(Error::failed(format!(
                "the prompt came out at {} tokens, expected at most {length}",
                tokens.len()
            )));
        }
        Ok(tokens)
    }

    /// The sentences in a text: the one asked for at `depth`, the others anywhere.
    fn among(&self, text: &str, depth: f64) -> String {
        let at = |depth: f64| sentence_end(text, (text.len() as f64 * depth) as usize);
        let mut places = vec![(at(depth), &self.asked)];
        for (i, other) in self.others.iter().enumerate() {
            places.push((at(scattered(self.index, i)), other));
        }
        places.sort_by_key(|(at, _)| *at);
        let mut hay = String::new();
        let mut from = 0;
        for (at, needle) in places {
            hay += &text[from..at];
            hay += &needle.sentence();
            from = at;
        }
        hay + &text[from..]
    }

    /// `count` more sentences and nothing else, the one asked for at `depth`.
    fn only(&self, count: usize, depth: f64) -> String {
        let first = self.index * 101 + 1 + self.others.len();
        // No key twice: two answers to one question would both be right.
        let more = (first..).take(count.min(KEYS - 1 - self.others.len().min(KEYS - 1)));
        let more = more.map(|i| Needle::new(i, true));
        let mut all: Vec<Needle> = self.others.iter().cloned().chain(more).collect();
        all.insert((all.len() as f64 * depth).round() as usize, self.asked.clone());
        all.iter().map(Needle::sentence).collect()
    }
}

/// A depth in 0..1 that looks random (multiples of the golden ratio spread evenly).
fn scattered(task: usize, i: usize) -> f64 {
    ((task * 31 + i + 1) as f64 * 0.618_033_988_749_895).fract()
}

/// The end of the sentence nearest before byte `at`, or the start of the text.
fn sentence_end(text: &str, at: usize) -> usize {
    let head = &text[..text.floor_char_boundary(at)];
    if head.len() == text.len() {
        return text.len();
    }
    head.rfind(['.', '!', '?']).map_or(0, |i| i + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn needles_differ() {
        let numbers: HashSet<String> = (0..200).map(|i| Needle::new(i, false).number).collect();
        assert_eq!(numbers.len(), 200);
        assert!(numbers.iter().all(|n| n.len() == 5));
        let keys: HashSet<String> = (0..KEYS).map(|i| Needle::new(i, true).key).collect();
        assert_eq!(keys.len(), KEYS);
    }

    #[test]
    fn needles_go_between_sentences() {
        let text = "One é. Two! Three";
        assert_eq!(sentence_end(text, 0), 0);
        assert_eq!(sentence_end(text, 5), 0);
        assert_eq!(&text[..sentence_end(text, 13)], "One é. Two!");
        assert_eq!(sentence_end(text, text.len()), text.len());
    }

    #[test]
    fn every_key_is_hidden_once_and_the_text_stays() {
        let text = "First. Second. Third. Fourth. Fifth. Sixth.";
        for index in 0..20 {
            let task = Task::new(index, 4, Hay::Text);
            let hay = task.among(text, 0.5);
            let mut rest = hay.clone();
            for needle in task.others.iter().chain([&task.asked]) {
                assert_eq!(hay.matches(&needle.sentence()).count(), 1, "{hay}");
                rest = rest.replace(&needle.sentence(), "");
            }
            assert_eq!(rest, text);
            assert_eq!(hay.matches(task.number()).count(), 1);
        }
    }

    #[test]
    fn a_haystack_of_needles_asks_for_one_of_many() {
        for (depth, place) in [(0.0, 0), (0.5, 50), (1.0, 100)] {
            let task = Task::new(3, 1, Hay::Needles);
            let hay = task.only(100, depth);
            assert_eq!(hay.matches("magic").count(), 101);
            assert_eq!(hay.matches(&task.asked.key).count(), 1);
            let before = hay.split(&task.asked.key).next().expect("text before");
            assert_eq!(before.matches("magic").count(), place + 1);
        }
        // More room than keys: none is used twice.
        let task = Task::new(0, 5, Hay::Needles);
        assert_eq!(task.only(10_000, 0.5).matches("magic").count(), KEYS);
    }
}
