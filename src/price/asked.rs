//! A price as people write it, in a file or a request.

use thiserror::Error;

use super::{
    Billing, Rates,
    gpus::{GPU_NAMES, GPUS},
};
use crate::types::NanoUsd;

const S_PER_HOUR: i128 = 3600;

/// Amounts in USD: tokens a million, device time a second or an hour, or that of a GPU by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    pub input: Option<NanoUsd>,
    pub cached_input: Option<NanoUsd>,
    pub output: Option<NanoUsd>,
    pub request: Option<NanoUsd>,
    pub gpu_second: Option<NanoUsd>,
    pub gpu_hour: Option<NanoUsd>,
    pub gpu: Option<String>,
    pub billing: Option<Billing>,
}

/// Which part of a price is wrong, without the unit that its name may end in.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct AskedError {
    pub field: &'static str,
    pub message: String,
}

impl Asked {
    /// Rates that hold together. What is not named costs nothing, but a price has to name what it is
    /// billed by: nothing becomes free by leaving a line out.
    pub fn rates(&self) -> Result<(Rates, Billing), AskedError> {
        let wrong = |field, message: &str| Err(AskedError { field, message: message.to_owned() });
        let billing = self.billing.unwrap_or_default();
        let device_second = self.device_second()?;
        match (billing, self.input, self.output, device_second) {
            (Billing::Tokens, None, _, _) => {
                return wrong("input", "the price of a million input tokens is missing");
            }
            (Billing::Tokens, _, None, _) => {
                return wrong("output", "the price of a million output tokens is missing");
            }
            (Billing::Device, _, _, None) => {
                let message = "device time is billed, but gpu_second, gpu_hour and gpu are missing";
                return wrong("gpu_hour", message);
            }
            _ => {}
        }
        let zero = NanoUsd(0);
        let input = self.input.unwrap_or(zero);
        let cached_input = self.cached_input.unwrap_or(input);
        if cached_input > input {
            return wrong("cached_input", "cached input tokens cost more than others");
        }
        let rates = Rates {
            input,
            cached_input,
            output: self.output.unwrap_or(zero),
            request: self.request.unwrap_or(zero),
            device_second: device_second.unwrap_or(zero),
        };
        Ok((rates, billing))
    }

    /// An hour's rate is rounded up to whole nano-USD a second.
    fn device_second(&self) -> Result<Option<NanoUsd>, AskedError> {
        let an_hour = |hour: i128| NanoUsd((hour + S_PER_HOUR - 1) / S_PER_HOUR);
        let error = |message| AskedError { field: "gpu", message };
        match (self.gpu_second, self.gpu_hour, &self.gpu) {
            (second, None, None) => Ok(second),
            (None, Some(hour), None) => Ok(Some(an_hour(hour.0))),
            (None, None, Some(name)) => match GPUS.iter().find(|gpu| gpu.name == name) {
                Some(gpu) => Ok(Some(an_hour(gpu.hour_nano_usd))),
                None => Err(error(format!(
                    "no GPU of the catalogue is called `{name}`; it has {}",
                    GPU_NAMES.join(", ")
                ))),
            },
            _ => Err(error("give one of gpu_second, gpu_hour and gpu".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(input: i128, output: i128) -> Asked {
        Asked { input: Some(NanoUsd(input)), output: Some(NanoUsd(output)), ..Asked::default() }
    }

    fn check(asked: &Asked, wrong: &str) {
        assert_eq!(asked.rates().map_err(|error| error.field), Err(wrong), "{asked:?}");
    }

    #[test]
    fn nothing_becomes_free_by_a_line_left_out() {
        let device = Asked { billing: Some(Billing::Device), ..asked(1, 1) };
        check(&Asked::default(), "input");
        check(&Asked { output: None, ..asked(1, 1) }, "output");
        check(&device, "gpu_hour");
        check(&Asked { cached_input: Some(NanoUsd(2)), ..asked(1, 1) }, "cached_input");
        check(&Asked { gpu: Some("abacus".into()), ..asked(1, 1) }, "gpu");
        let both =
            Asked { gpu_hour: Some(NanoUsd(1)), gpu_second: Some(NanoUsd(1)), ..asked(1, 1) };
        check(&both, "gpu");
    }

    #[test]
    fn an_hour_becomes_seconds_and_cached_input_costs_like_input() {
        let hour = Asked { gpu_hour: Some(NanoUsd(3601)), ..asked(7, 9) };
        let (rates, billing) = hour.rates().expect("a price");
        assert_eq!((rates.device_second, billing), (NanoUsd(2), Billing::Tokens));
        assert_eq!((rates.cached_input, rates.output), (NanoUsd(7), NanoUsd(9)));
        for name in GPU_NAMES {
            let named = Asked { gpu: Some(name.into()), ..asked(0, 0) };
            assert!(named.rates().is_ok_and(|(rates, _)| rates.device_second.0 > 0), "{name}");
        }
    }
}
