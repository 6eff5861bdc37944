//! Which vector instructions this process uses.

use std::sync::OnceLock;

/// Instruction sets that kernels are compiled for. All give equal bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Portable,
    Avx2,
    Avx512Vnni,
}

static ISA: OnceLock<Isa> = OnceLock::new();

/// The instruction set in use: the best of this machine, within the limit.
pub fn isa() -> Isa {
    *ISA.get_or_init(|| best(Isa::Avx512Vnni))
}

/// Sets the best instruction set that may be used and returns what is in use from now on, which
/// another call may have fixed before.
pub fn limit(most: Isa) -> Isa {
    *ISA.get_or_init(|| best(most))
}

fn best(most: Isa) -> Isa {
    available().into_iter().rfind(|isa| *isa <= most).unwrap_or(Isa::Portable)
}

/// All that this machine can run, the best last.
pub fn available() -> Vec<Isa> {
    let mut isas = vec![Isa::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            isas.push(Isa::Avx2);
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni") {
                isas.push(Isa::Avx512Vnni);
            }
        }
    }
    isas
}
