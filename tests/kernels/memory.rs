//! What puts things into a GPU's memory: packets of arrays, and values that look random.

use candela::ops::{
    Inbox, Packet,
    fill::Fill,
    gpu::{Buffer, Gpu, Half},
};

use crate::gpu::{EmulatedGpu, read};

/// Of memory that nothing was written to.
const UNTOUCHED: u32 = u32::MAX;

fn words(memory: &Buffer) -> Vec<u32> {
    let bytes = read(memory.address, memory.bytes);
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
}

#[test]
fn arrays_of_a_packet_get_to_their_places() {
    let gpu = EmulatedGpu::new(1, 0);
    let place = |words: usize| gpu.allocate(words * 4).expect("memory");
    let (row, matrix, longs) = (place(8), place(24), place(4));
    let long_row = place(70_000);
    let inbox = Inbox::new(&gpu, 100_000).expect("memory");
    let mut packet = Packet::default();
    packet.send(&gpu, &inbox).expect("an empty packet is nothing");
    packet.words(row.address, 100..105);
    packet.words(row.address + 28, []);
    packet.rows(matrix.address, 200..212, 4, 7);
    packet.longs(longs.address, [-1, 1 << 40]);
    packet.words(long_row.address, 0..69_999);
    packet.send(&gpu, &inbox).expect("fits");
    assert_eq!(words(&row), [100, 101, 102, 103, 104, UNTOUCHED, UNTOUCHED, UNTOUCHED]);
    for (at, word) in words(&matrix).into_iter().enumerate() {
        let (line, column) = (at as u32 / 7, at as u32 % 7);
        let expected = if column < 4 && line < 3 { 200 + line * 4 + column } else { UNTOUCHED };
        assert_eq!(word, expected, "word {at}");
    }
    assert_eq!(words(&longs), [u32::MAX, u32::MAX, 0, 1 << 8]);
    assert!(words(&long_row).into_iter().take(69_999).eq(0..69_999));
    assert_eq!(words(&long_row)[69_999], UNTOUCHED);
    packet.clear();
    packet.words(long_row.address, 0..101_000);
    assert!(packet.send(&gpu, &inbox).is_err(), "larger than where it goes");
}

#[test]
fn made_up_values_are_even_and_the_same_for_the_same_seed() {
    let gpu = EmulatedGpu::new(1, 0);
    let fill = |dtype: Half, count: usize, seed: u32| -> Vec<f32> {
        // A pack more must stay as it is.
        let memory = gpu.allocate((count + 8) * Half::BYTES).expect("memory");
        Fill { to: memory.address, count, dtype, seed, size: 0.5 }.run(&gpu).expect("runs");
        let bytes = read(memory.address, memory.bytes);
        let (halves, _) = bytes.as_chunks::<2>();
        let (values, rest) = halves.split_at(count);
        assert!(rest.iter().all(|bytes| *bytes == [0xff; 2]), "{count}: written past its end");
        values.iter().map(|bytes| dtype.value(u16::from_ne_bytes(*bytes))).collect()
    };
    for dtype in [Half::Bf16, Half::F16] {
        for count in [8, 1000, 8192] {
            let values = fill(dtype, count, 1);
            assert_eq!(values, fill(dtype, count, 1), "{count}");
            assert_ne!(values, fill(dtype, count, 2), "{count}: seeds differ");
            assert!(values.iter().all(|value| value.abs() <= 0.5));
        }
        let values = fill(dtype, 8192, 7);
        let mean = |of: fn(f64) -> f64| {
            values.iter().map(|value| of(f64::from(*value))).sum::<f64>() / 8192.0
        };
        let (average, square) = (mean(|x| x), mean(|x| x * x));
        assert!(average.abs() < 0.01, "average {average}");
        // Of even values within 0.5: a twelfth.
        assert!((square - 1.0 / 12.0).abs() < 0.004, "square {square}");
    }
}
