//! The emulator finds what it is there for: each kernel here is broken in one way.

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{read_words, words},
};

const OK: &str = "";

/// Runs `body`, with `in[64]` and `out[64]` of u32, a block of 64 threads and 64 bytes of dynamic shared
/// memory, and looks for `complaint`.
fn check(name: &str, body: &str, complaint: &str) -> Vec<u32> {
    let source = format!(
        "#include \"common.cuh\"\nstruct Args {{ const uint32_t* in; uint32_t* out; }};\n\
         __device__ inline void run(const Args& op) {{\n  uint32_t i = threadIdx.x;\n(void)op, (void)i;\n{body}\n}}\n\
         ENTRY(test, 64, Args)\n"
    );
    let numbers: Vec<u32> = (0..64).collect();
    let launch = Launch {
        kernel: "test".into(),
        grid: [1, 1, 1],
        threads: 64,
        shared_bytes: 64,
        args: vec![Arg::Buffer(0), Arg::Buffer(1)],
    };
    let buffers = [words(&numbers), words(&[77; 64])];
    match Emulator::build(name, &source).run(&buffers, &[launch]) {
        Ok(after) => {
            assert_eq!(complaint, OK, "{name} was not noticed");
            read_words(&after[1])
        }
        Err(said) => {
            assert!(complaint != OK && said.contains(complaint), "{name}: {said}");
            Vec::new()
        }
    }
}

#[test]
fn what_is_right_runs() {
    let reversed: Vec<u32> = (0..64).rev().collect();
    let body =
        "SHARED(uint32_t, all, 64); all[i] = op.in[i]; __syncthreads(); op.out[i] = all[63 - i];";
    assert_eq!(check("barrier", body, OK), reversed);
    let body =
        "uint32_t x = op.in[i]; for (int s = 16; s; s /= 2) x += __shfl_xor_sync(ALL_LANES, x, s);
        op.out[i] = x;";
    let sums: Vec<u32> = [[496; 32], [1520; 32]].concat();
    assert_eq!(check("shuffle", body, OK), sums);
    let body = "SHARED(uint4, all, 16); if (i < 16) { cp_async_16(all + i, op.in + 4 * i, true);
        cp_async_commit(); cp_async_wait<0>(); } __syncthreads();
        op.out[i] = reinterpret_cast<uint32_t*>(all)[63 - i];";
    assert_eq!(check("async_copy", body, OK), reversed);
}

/// Both conversions of the emulator, of every 16-bit value and of what lies around the middles.
#[test]
fn the_16_bit_types_round_as_they_should() {
    let source = "#include \"common.cuh\"\n
        struct Args { const float* in; uint32_t* out; float* back; uint32_t count; };\n
        template <typename T> __device__ void convert(const Args& op, uint32_t shift) {
          for (uint32_t i = threadIdx.x; i < op.count; i += 32) {
            T rounded = from_float<T>(op.in[i]);
            op.out[i] |= uint32_t(rounded.bits) << shift;
            op.back[2 * i + shift / 16] = to_float(rounded);
          }
        }
        __device__ inline void run(const Args& op) { convert<bf16>(op, 0); convert<f16>(op, 16); }\n
        ENTRY(test, 32, Args)\n";
    let finite = (0..=u16::MAX).map(half::f16::from_bits).filter(|x| x.is_finite());
    let mut values: Vec<f32> = finite.map(half::f16::to_f32).collect();
    values.sort_by(f32::total_cmp);
    let middles: Vec<f32> = values.windows(2).map(|two| (two[0] + two[1]) / 2.0).collect();
    values.extend(middles.iter().flat_map(|x| [*x, x.next_up(), x.next_down()]));
    values.extend((0..=u16::MAX).map(|x| half::bf16::from_bits(x).to_f32()));
    values.retain(|x| x.is_finite());
    let zeros = words(&vec![0; values.len()]);
    let bytes = crate::values::bytes_of(&values, f32::to_ne_bytes);
    let mut args: Vec<Arg> = (0..3).map(Arg::Buffer).collect();
    args.push(Arg::U32(values.len() as u32));
    let launch = Launch { kernel: "test".into(), grid: [1; 3], threads: 32, shared_bytes: 0, args };
    let buffers = [bytes, zeros.clone(), [zeros.clone(), zeros].concat()];
    let after = Emulator::build("round", source).run(&buffers, &[launch]).expect("it runs");
    let back: Vec<u32> = read_words(&after[2]);
    for (index, (value, bits)) in values.iter().zip(read_words(&after[1])).enumerate() {
        let wide = half::bf16::from_f32(*value);
        let narrow = half::f16::from_f32(value.clamp(-65504.0, 65504.0));
        let expected = u32::from(narrow.to_bits()) << 16 | u32::from(wide.to_bits());
        assert_eq!(bits, expected, "{value:e}: {bits:08x}");
        let expected = [wide.to_f32().to_bits(), narrow.to_f32().to_bits()];
        assert_eq!(back[2 * index..][..2], expected, "{value:e}");
    }
}

#[test]
fn what_is_not_written_keeps_its_poison() {
    let out = check("unwritten", "if (i != 13) op.out[i] = op.in[i];", OK);
    let kept: Vec<usize> = (0..64).filter(|index| out[*index] == 77).collect();
    assert_eq!(kept, [13]);
}

#[test]
fn what_is_broken_is_noticed() {
    let shared = "SHARED(uint32_t, all, 64); all[i] = op.in[i]; op.out[i] = all[(i + 1) % 64];";
    let unwaited =
        "SHARED(uint4, all, 16); if (i < 16) { cp_async_16(all + i, op.in + 4 * i, true);
        cp_async_commit(); } __syncthreads(); op.out[i] = reinterpret_cast<uint32_t*>(all)[i];
        if (i < 16) cp_async_wait<0>();";
    for (name, body, complaint) in [
        ("missing_barrier", shared, "depends on the order of threads"),
        ("missing_wait", unwaited, "depends on the order of threads"),
        ("read_past_the_end", "op.out[i] = op.in[i + 1];", "heap-buffer-overflow"),
        ("write_before_the_start", "op.out[i - 1] = i;", "AddressSanitizer"),
        ("shared_past_the_end", "SHARED(uint32_t, all, 60); all[i] = i;", "out of bounds"),
        (
            "dynamic_shared_past_the_end",
            "DYNAMIC_SHARED(all); all[i + 1] = 0;",
            "heap-buffer-overflow",
        ),
        (
            "two_barriers",
            "if (i < 32)\n __syncthreads();\n else\n __syncthreads();",
            "barriers of lines",
        ),
        (
            "half_a_warp",
            "if (i % 32 < 16) op.out[i] = __shfl_xor_sync(ALL_LANES, i, 1);",
            "never come",
        ),
        (
            "different_collectives",
            "if (i % 2) __syncwarp(); else op.out[i] = __ballot_sync(ALL_LANES, true);",
            "meets",
        ),
        (
            "barrier_and_shuffle",
            "if (i < 32) __syncthreads(); else if (i == 32) __syncwarp(); else __syncthreads();",
            "never come",
        ),
        (
            "copy_left",
            "SHARED(uint4, all, 1); cp_async_16(all, op.in, true); cp_async_commit();",
            "under way",
        ),
        (
            "misaligned",
            "op.out[i] = load_pack(reinterpret_cast<const bf16*>(op.in) + 1).value[0].bits;",
            "misaligned",
        ),
    ] {
        check(name, body, complaint);
    }
}
