use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use super::{ChatTemplate, today};
use crate::{
    conversation::{Conversation, Message},
    error::{Error, Result},
    mask::TurnShape,
    report::Report,
    tokenizer::Tokenizer,
};

/// OpenAI's ChatML: every turn between `<|im_start|>role` and `<|im_end|>`.
const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}";

/// Llama 3: every turn after a header, ended by `<|eot_id|>`.
const LLAMA_3: &str = "\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + (message.content or '') | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}";

/// Stanford Alpaca's prompt, continued with further rounds where there are some. A system message takes the preamble's place.
const ALPACA: &str = "\
{%- set with_input = messages | selectattr('input', 'defined') | list %}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content }}
{%- elif with_input %}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- else %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' and message.input is defined %}
        {{- '\\n\\n### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input + '\\n\\n### Response:\\n' }}
    {%- elif message.role == 'user' %}
        {{- '\\n\\n### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- (message.content or '') + (eos_token or '') }}
    {%- endif %}
{%- endfor %}";

/// A template that is built in.
struct Named {
    /// Its name, then what else it is called.
    names: &'static [&'static str],
    source: &'static str,
    /// The marks around turns: tokens of their own in the models the template is for.
    marks: &'static [&'static str],
}

const TURNS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

const BUILT_IN: [Named; 13] = [
    Named { names: &["chatml"], source: CHATML, marks: &TURNS },
    Named {
        names: &["llama-3", "llama3", "llama-3.1", "llama-3.2", "llama-3.3"],
        source: LLAMA_3,
        marks: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    },
    Named { names: &["llama-2", "llama2"], source: include_str!("named/llama-2.jinja"), marks: &[] },
    Named {
        names: &["gemma", "gemma-2", "gemma2", "gemma-3", "gemma3"],
        source: include_str!("named/gemma.jinja"),
        marks: &["<start_of_turn>", "<end_of_turn>"],
    },
    Named {
        names: &["mistral", "mistral-nemo"],
        source: include_str!("named/mistral.jinja"),
        marks: &["[INST]", "[/INST]"],
    },
    Named {
        names: &["phi-3", "phi3", "phi-3.5", "phi3.5"],
        source: include_str!("named/phi-3.jinja"),
        marks: &["<|user|>", "<|assistant|>", "<|end|>"],
    },
    Named {
        names: &["phi-4", "phi4"],
        source: include_str!("named/phi-4.jinja"),
        marks: &["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    },
    Named {
        names: &["qwen-2.5", "qwen2.5", "qwen-2", "qwen2"],
        source: include_str!("named/qwen-2.5.jinja"),
        marks: &TURNS,
    },
    Named { names: &["qwen-3", "qwen3"], source: include_str!("named/qwen-3.jinja"), marks: &TURNS },
    Named {
        names: &["deepseek-r1"],
        source: include_str!("named/deepseek-r1.jinja"),
        marks: &["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    },
    Named { names: &["zephyr"], source: include_str!("named/zephyr.jinja"), marks: &[] },
    Named { names: &["vicuna"], source: include_str!("named/vicuna.jinja"), marks: &[] },
    Named { names: &["alpaca"], source: ALPACA, marks: &[] },
];

/// The names of [`BUILT_IN`], for an error.
const NAMES: &str = "chatml, llama-3, llama-2, gemma, mistral, phi-3, phi-4, qwen-2.5, qwen-3, deepseek-r1, zephyr, \
    vicuna, alpaca";

/// The template of that name and what it is called first.
fn named(name: &str) -> Option<(&'static str, &'static Named)> {
    let name = name.to_ascii_lowercase().replace('_', "-");
    let template = BUILT_IN.iter().find(|template| template.names.contains(&name.as_str()))?;
    template.names.first().map(|first| (*first, template))
}

/// What `--chat-template` asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum TemplateChoice {
    /// The model's own; without one, ChatML for conversations and Alpaca's prompt for Alpaca rows.
    #[default]
    Auto,
    /// One that is built in, by name.
    Named(&'static str),
    /// A file with a Jinja template.
    File(PathBuf),
}

impl FromStr for TemplateChoice {
    type Err = Error;

    /// Reads `auto`, the name of a built-in template, or the path of a file.
    fn from_str(text: &str) -> Result<Self> {
        match (text, named(text)) {
            ("auto", _) => Ok(Self::Auto),
            (_, Some((name, _))) => Ok(Self::Named(name)),
            (path, None) if Path::new(path).is_file() => Ok(Self::File(path.into())),
            (other, None) => Err(Error::UnknownTemplate { name: other.to_string(), known: NAMES }),
        }
    }
}

/// The templates of a run: one for conversations, one for those with tools, one for Alpaca rows. They are the same but under `auto`: some
/// models have a template of their own for tools, and a base model has none.
#[derive(Debug, Clone)]
pub struct Template {
    pub(crate) conversation: Arc<ChatTemplate>,
    pub(crate) tools: Arc<ChatTemplate>,
    pub(crate) alpaca: Arc<ChatTemplate>,
    marks: &'static [&'static str],
}

impl Template {
    /// Finds and compiles the templates `choice` asks for.
    ///
    /// # Errors
    /// When a file cannot be read, or a template is not valid Jinja.
    pub fn choose<'a>(choice: &TemplateChoice, tokenizer: impl Into<Option<&'a Tokenizer>>) -> Result<Self> {
        let tokenizer = tokenizer.into();
        let special = tokenizer.map(Tokenizer::special_texts).unwrap_or_default();
        let conversation = match (choice, tokenizer.and_then(Tokenizer::chat_template)) {
            (TemplateChoice::Auto, Some((origin, source))) => ChatTemplate::new(origin, source, special)?,
            (TemplateChoice::Auto, None) => {
                let alpaca = Arc::new(built_in("alpaca", tokenizer)?);
                let conversation = Arc::new(built_in("chatml", tokenizer)?);
                return Ok(Self { tools: Arc::clone(&conversation), conversation, alpaca, marks: &TURNS });
            }
            (TemplateChoice::Named(name), _) => built_in(name, tokenizer)?,
            (TemplateChoice::File(path), _) => ChatTemplate::from_file(path, special)?,
        };
        let conversation = Arc::new(conversation);
        let marks = match choice {
            TemplateChoice::Named(name) => named(name).map_or(&[][..], |(_, template)| template.marks),
            _ => &[],
        };
        let for_tools = tokenizer.filter(|_| *choice == TemplateChoice::Auto).and_then(Tokenizer::tool_template);
        let tools = match for_tools {
            Some((origin, source)) => Arc::new(ChatTemplate::new(origin, source, special)?),
            None => Arc::clone(&conversation),
        };
        Ok(Self { alpaca: Arc::clone(&conversation), tools, conversation, marks })
    }

    /// The template of a conversation.
    pub(crate) fn of(&self, conversation: &Conversation) -> &Arc<ChatTemplate> {
        if conversation.has_tools() { &self.tools } else { &self.conversation }
    }

    /// Marks around turns of a built-in template that are no tokens of their own in this tokenizer: it is for models of
    /// another family, and each mark costs several tokens that mean nothing to this one yet.
    pub fn unknown_marks(&self, tokenizer: &Tokenizer) -> Vec<&'static str> {
        self.marks.iter().copied().filter(|mark| tokenizer.token_to_id(mark).is_none()).collect()
    }

    /// The text of a conversation, followed by the start of an assistant's turn if `add_generation_prompt`.
    ///
    /// # Errors
    /// [`Error::Refused`] with the template's own words, [`Error::Template`] when it fails or takes too long.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let conversation = Conversation { messages: messages.to_vec(), tools: None };
        self.conversation.render(&conversation, add_generation_prompt)
    }

    /// Tells what decides the text that conversations become.
    pub(crate) fn describe(&self, add: &mut impl FnMut(&str)) {
        for template in [&self.conversation, &self.tools, &self.alpaca] {
            add(template.source());
            if template.source().contains("strftime_now") {
                add(&today());
            }
        }
    }

    /// The text of a conversation, followed by the start of an assistant's turn.
    ///
    /// # Errors
    /// As [`Template::render`].
    pub fn render_prompt(&self, conversation: &Conversation) -> Result<String> {
        self.of(conversation).render(conversation, true)
    }

    /// Where the template of conversations comes from: a file, or `built in: chatml`.
    pub fn origin(&self) -> &str {
        self.conversation.origin()
    }

    /// The Jinja text of the template that most of a dataset's rendered rows went through; `None` where none did.
    pub fn used_for(&self, report: &Report) -> Option<&str> {
        let used = if report.alpaca > report.conversations { &self.alpaca } else { &self.conversation };
        (report.alpaca + report.conversations > 0).then(|| used.source())
    }

    /// The token with which the template ends an assistant's turn, if it is a special one.
    pub fn end_of_turn(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let shape = TurnShape::learn(&self.conversation, tokenizer);
        shape.end_of_turn.and_then(|text| tokenizer.token_to_id(&text))
    }
}

/// A built-in template begins with bos where the tokenizer puts one before a plain text, since rendered text is encoded
/// as it is.
fn built_in(name: &str, tokenizer: Option<&Tokenizer>) -> Result<ChatTemplate> {
    let source = named(name).map_or(CHATML, |(_, template)| template.source);
    let adds_bos = tokenizer.is_some_and(Tokenizer::adds_bos) && !source.contains("bos_token");
    let source = format!("{}{source}", if adds_bos { "{{- bos_token }}\n" } else { "" });
    // A tokenizer without an end of text: the variable has to exist, the ids get none.
    let mut special = tokenizer.map(Tokenizer::special_texts).unwrap_or_default().to_vec();
    for name in ["bos_token", "eos_token"] {
        if special.iter().all(|(known, _)| known != name) {
            special.push((name.to_string(), String::new()));
        }
    }
    ChatTemplate::new(&format!("built in: {name}"), &source, &special)
}
