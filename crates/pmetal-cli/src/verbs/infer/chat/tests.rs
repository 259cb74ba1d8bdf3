use std::{fs, io};

use super::*;
use crate::{
    interrupt::Interrupt,
    verbs::infer::testing::{args, base, engine},
};

const KITES: &str = "Please pack three red kites for Mara.";
const SCARVES: &str = "Quinn wants to buy 7 black scarves today.";

struct Typed(std::vec::IntoIter<String>);

impl Lines for Typed {
    fn read(&mut self, _: &str) -> Result<Line> {
        Ok(match self.0.next() {
            None => Line::End,
            Some(text) if text == "^C" => Line::Interrupted,
            Some(text) => Line::Text(text),
        })
    }
}

/// Notes what is written, and presses Ctrl-C at the first word of an answer.
struct Paper {
    text: Vec<u8>,
    press: Option<Interrupt>,
}

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(press) = self.press.take_if(|_| !bytes.is_empty()) {
            press.set();
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a chat printed: answers by line, notes by line after the greeting.
struct Printed {
    answers: Vec<String>,
    notes: Vec<String>,
}

fn talk_to(model: &str, flags: &[&str], lines: &[&str], press: bool) -> Printed {
    let args = args(model, flags);
    let engine = engine(&args);
    let mut out = Paper { text: Vec::new(), press: press.then(|| engine.interrupt.clone()) };
    let mut notes = Vec::new();
    let checkpoint = args.model.checkpoint().unwrap();
    let open = |adapter: Option<&Path>| Voice::open(&args, &checkpoint, adapter, true);
    let typed: Vec<String> = lines.iter().map(|line| line.to_string()).collect();
    Chat::new(&args, engine, &open, &mut out, &mut notes).run(&mut Typed(typed.into_iter())).unwrap();
    let lines =
        |text: Vec<u8>| -> Vec<String> { String::from_utf8(text).unwrap().lines().map(str::to_owned).collect() };
    Printed { answers: lines(out.text), notes: lines(notes).split_off(1) }
}

fn talk(lines: &[&str]) -> Printed {
    talk_to(&base(), &[], lines, false)
}

/// The number before a word of a note.
fn number(note: &str, word: &str) -> usize {
    let before = note.split(&format!(" {word}")).next().unwrap();
    before.rsplit(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("no number before '{word}': {note}"))
}

/// What a model says to messages that it reads from their beginning.
fn fresh(messages: &[(&str, &str)]) -> String {
    let mut engine = engine(&args(&base(), &[]));
    let messages = messages.iter().map(|(role, text)| Message::new(role, *text)).collect();
    let prompt = engine.voice.prepare_conversation(&Conversation { messages, tools: None }).unwrap();
    let params = engine.params.clone();
    engine.answer(&prompt, &params, &mut |_| Ok(())).unwrap().text
}

#[test]
fn a_turn_is_answered_in_the_light_of_those_before_and_only_what_is_new_is_read() {
    let first = fresh(&[("user", KITES)]);
    let second = fresh(&[("user", KITES), ("assistant", &first), ("user", SCARVES)]);
    let printed = talk(&[KITES, SCARVES]);
    assert_eq!(printed.answers, [first.as_str(), second.as_str()]);
    let [before, after] = printed.notes.as_slice() else { panic!("{:?}", printed.notes) };
    assert!(!before.contains("known"), "{before}");
    // prompt and answer of the first turn, less the end of the turn, which was not read
    let said = number(before, "read") + number(before, "tokens");
    assert!(number(after, "known").abs_diff(said) <= 1, "{printed:?}", printed = printed.notes);
    assert!(number(after, "read") < number(before, "read") + 12, "{after}");
}

#[test]
fn reset_forgets() {
    let printed = talk(&[KITES, "/reset", SCARVES, "/reset", KITES, "/exit", KITES]);
    assert_eq!(printed.answers, [fresh(&[("user", KITES)]), fresh(&[("user", SCARVES)]), fresh(&[("user", KITES)])]);
    assert!(printed.notes.iter().all(|note| !note.contains("known")), "{:?}", printed.notes);
}

#[test]
fn several_lines_are_one_turn_and_a_space_hides_a_command() {
    let printed =
        talk(&["\"\"\"", "Please pack three", "red kites for Mara.", "\"\"\"", "/reset", "one\\", "^C", " /exit"]);
    let together = fresh(&[("user", "Please pack three\nred kites for Mara.")]);
    assert_eq!(printed.answers.join("\n"), [together, fresh(&[("user", "/exit")])].join("\n"));
}

#[test]
fn the_system_turn_is_set_shown_and_taken_away() {
    let printed = talk(&["/system", "/system Be  brief.", "/system", KITES, "/reset", "/system off", KITES]);
    assert_eq!(printed.notes[..3], ["no system turn", "the system turn is set", "system: Be  brief."]);
    let with = fresh(&[("system", "Be  brief."), ("user", KITES)]);
    assert_eq!(printed.answers, [with, fresh(&[("user", KITES)])]);
    let given = talk_to(&base(), &["--system", "x"], &["/system", "/system off", KITES], false);
    assert_eq!((given.notes[0].as_str(), &given.answers[0]), ("system: x", &fresh(&[("user", KITES)])));
}

#[test]
fn saved_conversations_are_rows_of_messages() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("my chats.jsonl").display().to_string();
    let save = format!("/save {file}");
    let printed = talk(&["/save x", KITES, "/save", &save, "/reset", "/system Hello", SCARVES, &save]);
    assert_eq!(printed.notes[0], "there is no answer to save");
    assert_eq!(printed.notes[2], "give a file: /save FILE");
    assert_eq!(printed.notes[3], format!("a row of 2 messages is at the end of {file}"));
    let rows: Vec<Value> =
        fs::read_to_string(&file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let [kites, scarves] = [0, 1].map(|i| turn("assistant", &printed.answers[i]));
    assert_eq!(
        rows,
        [
            json!({"messages": [turn("user", KITES), kites]}),
            json!({"messages": [turn("system", "Hello"), turn("user", SCARVES), scarves]}),
        ]
    );
    let nowhere = talk(&[KITES, "/save /no/such/folder/x"]);
    assert!(nowhere.notes[1].starts_with("error: ") && nowhere.notes[1].contains("/no/such/folder/x"));
}

#[test]
fn commands_that_are_none_or_cannot_be_done_leave_the_chat_as_it_is() {
    let printed = talk(&["/rest", "/retry", "/lora", "/lora /no/such/adapter", "", KITES, "/help"]);
    assert!(printed.notes[0].starts_with("no command /rest: /help lists them"), "{:?}", printed.notes);
    assert_eq!(printed.notes[1..3], ["nothing to answer again", "adapter: off"]);
    assert!(printed.notes[3].starts_with("error: /no/such/adapter does not exist"), "{:?}", printed.notes);
    assert_eq!(printed.answers, [fresh(&[("user", KITES)])]);
    assert!(printed.notes.iter().any(|note| note.contains("/system TEXT")));
    assert!(printed.notes.iter().all(|note| note.len() <= 80 || note.starts_with("error")), "{:?}", printed.notes);
}

#[test]
fn another_try_is_another_draw() {
    let flags = ["--temperature", "4", "--max-tokens", "12"];
    let printed = talk_to(&base(), &flags, &[KITES, "/retry", "/reset", KITES], false);
    let [first, second, ..] = printed.answers.as_slice() else { panic!() };
    assert_ne!(first, second);
    let retried = printed.notes.iter().find(|note| note.contains("known")).unwrap();
    assert_eq!(number(retried, "read"), 1, "only the last token of the same prompt is read again");
}

#[test]
fn ctrl_c_stops_an_answer_and_keeps_what_was_said() {
    let printed = talk_to(&base(), &[], &[KITES, "^C", SCARVES], true);
    let whole = fresh(&[("user", KITES)]);
    let [first, second] = printed.answers.as_slice() else { panic!("{:?}", printed.answers) };
    assert!(whole.starts_with(first) && first.len() < whole.len() && !first.is_empty(), "{first}");
    assert!(printed.notes[0].ends_with("; stopped"), "{:?}", printed.notes);
    assert_eq!(*second, fresh(&[("user", KITES), ("assistant", first), ("user", SCARVES)]));
}

/// The base model with a context of so many tokens.
fn with_context(tokens: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(base()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let file = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    config["max_position_embeddings"] = tokens.into();
    fs::write(file, config.to_string()).unwrap();
    folder
}

#[test]
fn a_context_that_fills_up_is_said_before_and_when_it_is_full() {
    let turn = talk(&[KITES]).notes.remove(0);
    let (read, made) = (number(&turn, "read"), number(&turn, "tokens"));
    // one turn nearly fills it, a second has no place
    let folder = with_context(read + made + 4);
    let lines = [KITES, SCARVES, "/reset", KITES];
    let printed = talk_to(folder.path().to_str().unwrap(), &[], &lines, false);
    assert!(printed.notes[1].contains(&format!("of the context's {} tokens are used; /reset", read + made + 4)));
    let full = format!("tokens, the model's context {}: /reset begins a new one", read + made + 4);
    assert!(printed.notes[2].ends_with(&full), "{:?}", printed.notes);
    let answer = fresh(&[("user", KITES)]);
    assert_eq!(printed.answers, [answer.clone(), answer]);

    let folder = with_context(read + 2);
    let printed = talk_to(folder.path().to_str().unwrap(), &[], &[KITES], false);
    assert!(printed.notes[0].ends_with(&format!("; the context of {} tokens is full: /reset", read + 2)));
}
