//! Chat templates: Jinja, as tokenizer files carry them.

use super::{TextError, Tokenizer};
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};

/// Put inside special-token literals that a user typed, so that they stay text.
const NONCE: char = '\u{10fffd}';

#[derive(Clone, Debug)]
pub struct ChatMessage {
    pub role: String,
    pub content: String,
    pub name: Option<String>,
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TextError::Template(error.to_string()))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(|error| TextError::Template(error.to_string()))?;
        let owned = |text: Option<&str>| text.unwrap_or_default().to_owned();
        Ok(Self { environment, bos: owned(bos), eos: owned(eos) })
    }

    /// Token ids of a conversation. Special tokens written inside a message stay ordinary text.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, TextError> {
        let defused: Vec<ChatMessage> = messages
            .iter()
            .map(|message| ChatMessage {
                role: tokenizer.defuse(&message.role, NONCE),
                content: tokenizer.defuse(&message.content, NONCE),
                name: message.name.as_ref().map(|name| tokenizer.defuse(name, NONCE)),
            })
            .collect();
        let text = self.render(&defused, add_generation_prompt)?;
        tokenizer.encode_with_special(&text, NONCE)
    }

    /// The text of a conversation.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let template = self.environment.get_template("chat");
        let messages: Vec<Value> = messages.iter().map(as_value).collect();
        let (bos_token, eos_token) = (&self.bos, &self.eos);
        template
            .and_then(|template| {
                template.render(context! { messages, add_generation_prompt, bos_token, eos_token })
            })
            .map_err(|error| TextError::Template(error.detail().unwrap_or("it failed").to_owned()))
    }
}

fn as_value(message: &ChatMessage) -> Value {
    let pairs = [("role", Some(&message.role)), ("content", Some(&message.content))];
    let pairs = pairs.into_iter().chain([("name", message.name.as_ref())]);
    Value::from_pairs(pairs.filter_map(|(key, value)| Some((key, value?.clone()))))
}
