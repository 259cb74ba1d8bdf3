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
        {{- (message.content or '') + eos_token }}
    {%- endif %}
{%- endfor %}";

const NAMES: &str = "chatml, llama-3, alpaca";

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
        match text {
            "auto" => Ok(Self::Auto),
            "chatml" => Ok(Self::Named("chatml")),
            "llama-3" | "llama3" => Ok(Self::Named("llama-3")),
            "alpaca" => Ok(Self::Named("alpaca")),
            path if Path::new(path).is_file() => Ok(Self::File(path.into())),
            other => Err(Error::UnknownTemplate { name: other.to_string(), known: NAMES }),
        }
    }
}

/// The templates of a run: one for conversations, one for Alpaca rows; the same but for a base model under `auto`.
#[derive(Debug, Clone)]
pub struct Template {
    pub(crate) conversation: Arc<ChatTemplate>,
    pub(crate) alpaca: Arc<ChatTemplate>,
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
                return Ok(Self { conversation: Arc::new(built_in("chatml", tokenizer)?), alpaca });
            }
            (TemplateChoice::Named(name), _) => built_in(name, tokenizer)?,
            (TemplateChoice::File(path), _) => ChatTemplate::from_file(path, special)?,
        };
        let conversation = Arc::new(conversation);
        Ok(Self { alpaca: Arc::clone(&conversation), conversation })
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
        for template in [&self.conversation, &self.alpaca] {
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
        self.conversation.render(conversation, true)
    }

    /// Where the template of conversations comes from: a file, or `built in: chatml`.
    pub fn origin(&self) -> &str {
        self.conversation.origin()
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
    let bos = if tokenizer.is_some_and(Tokenizer::adds_bos) { "{{- bos_token }}\n" } else { "" };
    let source = match name {
        "llama-3" => LLAMA_3.to_string(),
        "alpaca" => format!("{bos}{ALPACA}"),
        _ => format!("{bos}{CHATML}"),
    };
    // A tokenizer without an end of text: the variable has to exist, the ids get none.
    let mut special = tokenizer.map(Tokenizer::special_texts).unwrap_or_default().to_vec();
    for name in ["bos_token", "eos_token"] {
        if special.iter().all(|(known, _)| known != name) {
            special.push((name.to_string(), String::new()));
        }
    }
    ChatTemplate::new(&format!("built in: {name}"), &source, &special)
}
