//! Hugging Face's `config.json`, old (`rope_scaling`, `rope_theta`) and as transformers 5 writes it
//! (`rope_parameters`). What a key left out means is what transformers takes it to mean; what the
//! forward does not know is refused by name.

use serde_json::Value;

use super::{Biases, Family, ModelConfig, ModelError, RopeScaling, config::checked_layers};

/// transformers' defaults of keys that a file may leave out.
const ROPE_THETA: f64 = 10_000.0;
const RMS_NORM_EPS: f64 = 1e-6;
const SLIDING_WINDOW: usize = 4096;
const MAX_WINDOW_LAYERS: usize = 28;
const QWEN3_HEAD_DIM: usize = 128;

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf_json(text: &str) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text)
            .map_err(|error| ModelError::Format(format!("config.json: {error}")))?;
        let json = Fields { object: &json, place: "" };
        let family = family(json)?;
        refuse_unknown(json)?;
        let heads = json.needed("num_attention_heads")?;
        let layers = checked_layers(json.needed("num_hidden_layers")?)?;
        let max_position = json.needed("max_position_embeddings")?;
        let (rope_theta, rope_scaling) = rope(json, max_position)?;
        let config = Self {
            family,
            vocab_size: json.needed("vocab_size")?,
            hidden_size: json.needed("hidden_size")?,
            intermediate_size: json.needed("intermediate_size")?,
            layers,
            heads,
            kv_heads: kv_heads(json, family, heads)?,
            head_dim: head_dim(json, family, heads)?,
            rms_norm_eps: json.number("rms_norm_eps")?.unwrap_or(RMS_NORM_EPS) as f32,
            rope_theta,
            rope_scaling,
            max_position,
            layer_windows: layer_windows(json, family, layers)?,
            tie_word_embeddings: json.flag("tie_word_embeddings")?,
            biases: biases(json, family)?,
            qk_norm: family == Family::Qwen3,
            eos_token_ids: json.ids("eos_token_id")?,
            bos_token_id: json.ids("bos_token_id")?.first().copied(),
        };
        config.validate()?;
        Ok(config)
    }
}

/// An object of the file. A key whose value is null counts as left out.
#[derive(Clone, Copy)]
struct Fields<'a> {
    object: &'a Value,
    /// What precedes a key where it is named: the path of this object.
    place: &'static str,
}

impl<'a> Fields<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it null.
    fn states(self, key: &str) -> bool {
        self.object.get(key).is_some()
    }

    fn wrong(self, key: &str, what: &str) -> ModelError {
        ModelError::Format(format!("config.json: {}{key} {what}", self.place))
    }

    /// The value of `key` through `read`, which knows `what` it should be.
    fn typed<T>(
        self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let typed = |value| read(value).ok_or_else(|| self.wrong(key, what));
        self.get(key).map(typed).transpose()
    }

    fn size(self, key: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
        self.typed(key, "is not a whole number", read)
    }

    fn needed(self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| self.wrong(key, "is missing"))
    }

    fn number(self, key: &str) -> Result<Option<f64>, ModelError> {
        let positive = |value: &Value| value.as_f64().filter(|value| *value > 0.0);
        self.typed(key, "is not a number above zero", positive)
    }

    fn needed_number(self, key: &str) -> Result<f64, ModelError> {
        self.number(key)?.ok_or_else(|| self.wrong(key, "is missing"))
    }

    fn flag(self, key: &str) -> Result<bool, ModelError> {
        Ok(self.typed(key, "is neither true nor false", Value::as_bool)?.unwrap_or(false))
    }

    fn text(self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(key, "is not a string", Value::as_str)
    }

    fn list(self, key: &str) -> Result<Option<&'a [Value]>, ModelError> {
        self.typed(key, "is not a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// One token id or a list of them.
    fn ids(self, key: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let read = |value: &Value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            value => id(value).map(|id| vec![id]),
        };
        Ok(self.typed(key, "is not a token id or a list of them", read)?.unwrap_or_default())
    }
}

fn family(json: Fields<'_>) -> Result<Family, ModelError> {
    let list = json.list("architectures")?.unwrap_or_default();
    match list.first().and_then(Value::as_str).unwrap_or("(none)") {
        "LlamaForCausalLM" => Ok(Family::Llama),
        "MistralForCausalLM" => Ok(Family::Mistral),
        "Qwen2ForCausalLM" => Ok(Family::Qwen2),
        "Qwen3ForCausalLM" => Ok(Family::Qwen3),
        other => Err(ModelError::Unsupported(format!("architecture {other}"))),
    }
}

/// Keys that would change the arithmetic in ways the forward does not have.
fn refuse_unknown(json: Fields<'_>) -> Result<(), ModelError> {
    // transformers knows SiLU by both names.
    let activation = json.text("hidden_act")?.unwrap_or("silu");
    if !matches!(activation, "silu" | "swish") {
        return Err(ModelError::Unsupported(format!("hidden_act {activation}")));
    }
    if let Some(quantised) = json.get("quantization_config") {
        let method = quantised.get("quant_method").and_then(Value::as_str).unwrap_or("(none)");
        return Err(ModelError::Unsupported(format!("quantization_config of {method}")));
    }
    Ok(())
}

fn kv_heads(json: Fields<'_>, family: Family, heads: usize) -> Result<usize, ModelError> {
    match json.size("num_key_value_heads")? {
        Some(kv_heads) => Ok(kv_heads),
        // Llama's means "as many as heads" where it is left out, the others' only where it is null.
        None if json.states("num_key_value_heads") || family == Family::Llama => Ok(heads),
        None => Err(json.wrong("num_key_value_heads", "is missing")),
    }
}

fn head_dim(json: Fields<'_>, family: Family, heads: usize) -> Result<usize, ModelError> {
    let hidden_size = json.needed("hidden_size")?;
    match json.size("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if family == Family::Qwen3 => Ok(QWEN3_HEAD_DIM),
        None if heads > 0 && hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => Err(json.wrong("hidden_size", &format!("{hidden_size} over {heads} heads"))),
    }
}

/// Mistral and Qwen2 fix what has a bias; Llama and Qwen3 have a key for it.
fn biases(json: Fields<'_>, family: Family) -> Result<Biases, ModelError> {
    let attention = json.flag("attention_bias")?;
    Ok(match family {
        Family::Llama => Biases { qkv: attention, o: attention, mlp: json.flag("mlp_bias")? },
        Family::Mistral => Biases::default(),
        Family::Qwen2 => Biases { qkv: true, ..Biases::default() },
        Family::Qwen3 => Biases { qkv: attention, o: attention, mlp: false },
    })
}

/// The window of each layer: Mistral's holds in all of them, Qwen's in those of `layer_types`, or
/// from layer `max_window_layers` on.
fn layer_windows(
    json: Fields<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
    let on = family == Family::Mistral || qwen && json.flag("use_sliding_window")?;
    let window = match on {
        // Null turns the window off; left out it is the default.
        true if json.states("sliding_window") => json.size("sliding_window")?,
        true => Some(SLIDING_WINDOW),
        false => None,
    };
    let full = match qwen {
        true => json.size("max_window_layers")?.unwrap_or(MAX_WINDOW_LAYERS).min(layers),
        false => 0,
    };
    let mut windows = vec![None; full];
    windows.resize(layers, window);
    let Some(types) = json.list("layer_types")? else { return Ok(windows) };
    let stated = types.iter().map(|kind| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(json.wrong("sliding_window", "is off, layer_types has it"))
        }
        _ => Err(ModelError::Unsupported(format!("layer type {kind}"))),
    });
    let stated: Vec<Option<usize>> = stated.collect::<Result<_, _>>()?;
    // transformers reads the list for Qwen alone, and would run others as if it were not there.
    if !qwen && stated != windows {
        return Err(ModelError::Unsupported(format!("layer_types in {family:?}")));
    }
    Ok(stated)
}

/// Theta and scaling. `rope_scaling` counts before `rope_parameters`, and a theta inside of either
/// before the one beside it.
fn rope(json: Fields<'_>, max_position: usize) -> Result<(f64, RopeScaling), ModelError> {
    let filled =
        |key| json.get(key).filter(|value| value.as_object().is_none_or(|o| !o.is_empty()));
    let nothing = Value::Object(serde_json::Map::new());
    let (inner, place) = match (filled("rope_scaling"), filled("rope_parameters")) {
        (Some(scaling), _) => (scaling, "rope_scaling."),
        (None, Some(parameters)) => (parameters, "rope_parameters."),
        (None, None) => (&nothing, ""),
    };
    let Some(object) = inner.as_object() else {
        return Err(json.wrong(place.trim_end_matches('.'), "is not an object"));
    };
    if let Some((kind, _)) = object.iter().find(|(_, value)| value.is_object()) {
        return Err(ModelError::Unsupported(format!("{place}{kind}, rope by layer type,")));
    }
    let fields = Fields { object: inner, place };
    for fields in [json, fields] {
        if fields.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(ModelError::Unsupported("partial_rotary_factor below one".into()));
        }
    }
    let outer_theta = json.number("rope_theta")?;
    let theta = fields.number("rope_theta")?.or(outer_theta).unwrap_or(ROPE_THETA);
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    let original = "original_max_position_embeddings";
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: fields.needed_number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: fields.needed_number("factor")?,
            low_freq_factor: fields.needed_number("low_freq_factor")?,
            high_freq_factor: fields.needed_number("high_freq_factor")?,
            original_max_position: match json.number(original)? {
                Some(original) => original,
                None => fields.number(original)?.unwrap_or(max_position as f64),
            },
        },
        other => return Err(ModelError::Unsupported(format!("rope type {other}"))),
    };
    Ok((theta, scaling))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A configuration of `family` with `changes` laid over it. Null removes a key, but for
    /// `sliding_window`, where it is a value.
    fn read(family: &str, changes: &Value) -> Result<ModelConfig, ModelError> {
        let mut config = json!({
            "architectures": [format!("{family}ForCausalLM")], "vocab_size": 97, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 256, "hidden_act": "silu",
        });
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let object = config.as_object_mut().expect("an object");
        object.retain(|key, value| !value.is_null() || key == "sliding_window");
        ModelConfig::from_hf_json(&config.to_string())
    }

    #[test]
    fn what_the_forward_does_not_know_is_refused_by_name() {
        let cases = [
            ("Gemma", json!({}), "architecture GemmaForCausalLM is not supported"),
            ("Llama", json!({"architectures": null}), "architecture (none)"),
            ("Llama", json!({"architectures": []}), "architecture (none)"),
            ("Llama", json!({"architectures": "LlamaForCausalLM"}), "architectures is not a list"),
            ("Llama", json!({"hidden_act": "gelu"}), "hidden_act gelu is not supported"),
            ("Qwen3", json!({"hidden_act": 3}), "hidden_act is not a string"),
            ("Llama", json!({"quantization_config": {"quant_method": "gptq"}}), "of gptq"),
            (
                "Llama",
                json!({"rope_scaling": {"type": "dynamic", "factor": 2}}),
                "rope type dynamic",
            ),
            ("Llama", json!({"rope_scaling": {"rope_type": "longrope"}}), "rope type longrope"),
            (
                "Qwen2",
                json!({"rope_parameters": {"rope_type": "yarn", "factor": 4}}),
                "rope type yarn",
            ),
            ("Qwen2", json!({"rope_parameters": {"full_attention": {}}}), "rope by layer type"),
            ("Llama", json!({"rope_parameters": 7}), "rope_parameters is not an object"),
            (
                "Llama",
                json!({"rope_scaling": {"type": "linear"}}),
                "rope_scaling.factor is missing",
            ),
            ("Llama", json!({"rope_scaling": {"type": 1}}), "rope_scaling.type is not a string"),
            (
                "Llama",
                json!({"rope_parameters": {"rope_type": "linear", "factor": 0}}),
                "rope_parameters.factor is not a number above zero",
            ),
            (
                "Llama",
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "high_freq_factor": 4}}),
                "rope_scaling.low_freq_factor is missing",
            ),
            (
                "Llama",
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                    "high_freq_factor": 4}}),
                "low_freq_factor 4, high 4",
            ),
            ("Llama", json!({"rope_theta": "big"}), "rope_theta is not a number"),
            ("Llama", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            ("Llama", json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), "partial_rotary"),
            ("Qwen2", json!({"layer_types": ["full_attention", "chunked_attention"]}), "chunked"),
            ("Qwen2", json!({"layer_types": ["full_attention"]}), "windows"),
            (
                "Qwen2",
                json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
                "sliding_window is off",
            ),
            (
                "Mistral",
                json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
                "layer_types in Mistral",
            ),
            ("Mistral", json!({"sliding_window": 0}), "windows"),
            ("Mistral", json!({"num_key_value_heads": null}), "num_key_value_heads is missing"),
            ("Llama", json!({"num_key_value_heads": "two"}), "num_key_value_heads is not a whole"),
            ("Llama", json!({"num_key_value_heads": 3}), "4 heads over 3 KV heads"),
            ("Llama", json!({"num_attention_heads": 0}), "hidden_size 64 over 0 heads"),
            ("Llama", json!({"hidden_size": 66}), "hidden_size 66 over 4 heads"),
            ("Llama", json!({"head_dim": 15}), "head_dim 15 is not even"),
            ("Llama", json!({"vocab_size": null}), "vocab_size is missing"),
            ("Llama", json!({"intermediate_size": -1}), "intermediate_size is not a whole number"),
            ("Llama", json!({"num_hidden_layers": 1u64 << 40}), "1099511627776 layers"),
            ("Llama", json!({"vocab_size": 1u64 << 40}), "a size is 1099511627776"),
            ("Llama", json!({"attention_bias": "no"}), "attention_bias is neither"),
            ("Llama", json!({"eos_token_id": [2, "end"]}), "eos_token_id is not a token id"),
            ("Llama", json!({"eos_token_id": 1u64 << 32}), "eos_token_id is not a token id"),
        ];
        for (family, changes, message) in cases {
            let error = read(family, &changes).expect_err(message).to_string();
            assert!(error.contains(message), "{family} {changes}: {error}");
        }
    }

    #[test]
    fn keys_mean_what_they_mean_to_transformers() {
        type Same = fn(&ModelConfig) -> bool;
        let linear =
            |theta: f64| json!({"rope_type": "linear", "factor": 2.0, "rope_theta": theta});
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        });
        let cases: [(&str, Value, Same); 17] = [
            ("Llama", json!({}), |c| c.rope_theta == 1e4 && c.rope_scaling == RopeScaling::None),
            ("Llama", json!({"num_key_value_heads": null}), |c| c.kv_heads == 4),
            ("Llama", json!({"sliding_window": 8}), |c| c.layer_windows == [None; 3]),
            ("Llama", json!({"hidden_act": "swish", "head_dim": 24}), |c| c.head_dim == 24),
            ("Llama", json!({"attention_bias": true}), |c| {
                c.biases.qkv && c.biases.o && !c.biases.mlp
            }),
            ("Llama", json!({"rope_parameters": linear(5.0), "rope_theta": 7.0}), |c| {
                c.rope_theta == 5.0 && c.rope_scaling == RopeScaling::Linear { factor: 2.0 }
            }),
            ("Llama", json!({"rope_scaling": linear(3.0), "rope_parameters": linear(5.0)}), |c| {
                c.rope_theta == 3.0
            }),
            ("Llama", json!({"rope_scaling": {}, "rope_parameters": linear(5.0)}), |c| {
                c.rope_theta == 5.0
            }),
            ("Llama", json!({"rope_scaling": llama3, "rope_theta": 9}), |c| {
                c.rope_theta == 9.0 && format!("{:?}", c.rope_scaling).contains("position: 256.0")
            }),
            ("Llama", json!({"eos_token_id": [1, 2], "bos_token_id": 3}), |c| {
                c.eos_token_ids == [1, 2] && c.bos_token_id == Some(3)
            }),
            ("Mistral", json!({"attention_bias": true}), |c| c.biases == Biases::default()),
            ("Mistral", json!({}), |c| c.layer_windows == [Some(4096); 3]),
            ("Mistral", json!({"sliding_window": null}), |c| c.layer_windows == [None; 3]),
            ("Qwen2", json!({"sliding_window": 8}), |c| {
                c.layer_windows == [None; 3] && c.biases.qkv && !c.biases.o
            }),
            (
                "Qwen2",
                json!({"sliding_window": 8, "use_sliding_window": true, "max_window_layers": 2}),
                |c| c.layer_windows == [None, None, Some(8)],
            ),
            (
                "Qwen3",
                json!({"use_sliding_window": true, "layer_types":
                    ["sliding_attention", "full_attention", "sliding_attention"]}),
                |c| c.layer_windows == [Some(4096), None, Some(4096)],
            ),
            ("Qwen3", json!({}), |c| c.head_dim == 128 && c.qk_norm && !c.biases.qkv),
        ];
        for (family, changes, same) in cases {
            let config = read(family, &changes).expect(family);
            assert!(same(&config), "{family} {changes}: {config:?}");
        }
    }
}
