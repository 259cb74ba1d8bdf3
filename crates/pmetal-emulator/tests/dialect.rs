//! What the dialect's words compute in the emulator.

mod trial;

use candle_core::DType;
use half::{bf16, f16};
use pmetal_metal::Grid;
use trial::{TRIAL_OF_64, Trial};

#[test]
fn threads_hand_values_over_at_barriers() {
    let reverse = "THREADGROUP(float, s, 64);
        s[THREAD] = float(x[THREAD]);
        BARRIER();
        y[THREAD] = T(s[63 - THREAD]);";
    let [y, _] = TRIAL_OF_64.run(reverse).unwrap();
    assert_eq!(y, (0..64).rev().map(|i| i as f32).collect::<Vec<_>>());

    let reverse_on_the_device = "y[THREAD] = x[THREAD];
        z[THREAD] += 1.0f;
        BARRIER_DEVICE();
        const float other = z[63 - THREAD];
        BARRIER_DEVICE();
        z[THREAD] = other;";
    let [_, z] = TRIAL_OF_64.run(reverse_on_the_device).unwrap();
    assert_eq!(z, (1..65).rev().map(|i| i as f32).collect::<Vec<_>>());

    let in_simd_groups = "THREADGROUP(float, s, 64);
        s[THREAD] = float(x[THREAD]);
        SIMD_BARRIER();
        y[THREAD] = T(s[32 * SIMD + (LANE + 1) % 32]);";
    let [y, _] = TRIAL_OF_64.run(in_simd_groups).unwrap();
    assert_eq!(y, (0..64).map(|i| (i / 32 * 32 + (i + 1) % 32) as f32).collect::<Vec<_>>());
}

#[test]
fn ids_cover_the_grid() {
    let body = "y[THREAD_IN_GRID] = x[THREAD_IN_GRID];
        z[THREAD_IN_GRID] = float(10000 * GROUPS_X + 1000 * GROUP_X + 100 * SIMDS + 10 * SIMD) + float(LANE == THREAD % 32);
        if (THREAD_IN_GRID == 0) z[191] = float(GRID_THREADS + THREADS);";
    let trial = Trial { n: 192, grid: Grid::line(3, 64), ..TRIAL_OF_64 };
    assert!(trial.run(body).unwrap_err().contains("another threadgroup"));
    let [_, z] = trial.run(body.split("if").next().unwrap()).unwrap();
    let expected = |i: usize| (30000 + 1000 * (i / 64) + 200 + 10 * (i % 64 / 32) + 1) as f32;
    assert_eq!(z, (0..192).map(expected).collect::<Vec<_>>());
}

#[test]
fn simd_functions_take_from_their_lanes() {
    let value = |body: &str| {
        let [y, _] = TRIAL_OF_64.run(&format!("const float v = float(x[THREAD]);\ny[THREAD] = T({body});")).unwrap();
        y
    };
    let lanes = |f: fn(usize) -> usize| (0..64).map(|i| (i / 32 * 32 + f(i % 32)) as f32).collect::<Vec<_>>();
    let groups = |a: f32, b: f32| [[a; 32], [b; 32]].concat();
    assert_eq!(value("simd_sum(v)"), groups(496.0, 1520.0));
    assert_eq!(value("float(simd_sum(uint(THREAD)))"), groups(496.0, 1520.0));
    assert_eq!(value("simd_max(v)"), groups(31.0, 63.0));
    assert_eq!(value("simd_min(v)"), groups(0.0, 32.0));
    assert_eq!(value("float(simd_max(uint(THREAD)) + simd_min(uint(THREAD)))"), groups(31.0, 95.0));
    assert_eq!(value("simd_broadcast(v, 7)"), lanes(|_| 7));
    assert_eq!(value("simd_shuffle(v, 31 - LANE)"), lanes(|i| 31 - i));
    assert_eq!(value("simd_shuffle_xor(v, 5)"), lanes(|i| i ^ 5));
    assert_eq!(value("LANE < 30 ? 0.0f : 1.0f").iter().sum::<f32>(), 4.0);
    let down = value("simd_shuffle_down(v, 2)");
    assert_eq!((down[29], down[32]), (31.0, 34.0));
    assert!(down[30].is_nan() && down[63].is_nan());
}

#[test]
fn functions_get_pointers_and_references() {
    let functions = "FUNCTION float sum(DEVICE_PTR(const T) from, uint n) {
            float s = 0.0f;
            for (uint i = 0; i < n; ++i) s += float(from[i]);
            return s;
        }
        FUNCTION void put(THREADGROUP_PTR(float) to, uint i, float v, THREAD_REF(float) copy) {
            to[i] = v;
            copy = to[i];
        }
        template <uint N> FUNCTION void move(DEVICE_PTR(const T) from, DEVICE_PTR(T) to) {
            for (uint i = 0; i < N; i += 4) store4(to, i, load4(from, i));
        }";
    let body = "THREADGROUP(float, s, 64);
        float copy = 0.0f;
        put(s + 8 * (THREAD / 8), THREAD % 8, sum(x + 16, 2), copy);
        z[THREAD] = copy;
        z[THREAD] *= 2.0f;
        if (THREAD < 8) move<8>(x + 8 * THREAD, y + 8 * THREAD);";
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [y, z] = Trial { functions, dtype, ..TRIAL_OF_64 }.run(body).unwrap();
        assert_eq!(z, [66.0; 64]);
        assert_eq!(y, (0..64).map(|i| i as f32).collect::<Vec<_>>());
    }
}

#[test]
fn halves_widen_and_round_as_the_half_crate_says() {
    check_halves(DType::F16, |v| f16::from_f32(v).to_f32(), |bits| f16::from_bits(bits).to_f32());
    check_halves(DType::BF16, |v| bf16::from_f32(v).to_f32(), |bits| bf16::from_bits(bits).to_f32());
}

fn check_halves(dtype: DType, round: fn(f32) -> f32, widen: fn(u16) -> f32) {
    let every: Vec<f32> = (0..=u16::MAX).map(widen).collect();
    // The number, its neighbours, and both sides of the midpoints around it.
    for offset in [0, 1, 0x7fff, 0x8000, 0x8001, 0xfff, 0x1000, 0x1001, u32::MAX, 0xffff_f000, 0xffff_8000] {
        let near: Vec<f32> = every.iter().map(|v| f32::from_bits(v.to_bits().wrapping_add(offset))).collect();
        let trial = Trial { dtype, n: every.len(), grid: Grid::line(64, 1024), ..TRIAL_OF_64 };
        let body = "const uint i = THREAD_IN_GRID;
            y[i] = T(z[i]);
            z[i] = float(x[i]);";
        let [y, z] = trial.run_on(body, &every, &near).unwrap();
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        for i in 0..every.len() {
            assert!(same(y[i], round(near[i])), "{dtype:?}: {:e} rounds to {:e}", near[i], y[i]);
            assert!(same(z[i], every[i]), "{dtype:?}: {i:#x} widens to {:e}", z[i]);
        }
    }
}

#[test]
fn matrices_of_simd_groups_multiply() {
    // x is A [8, 16], z is B [8, 16] read as its transpose [16, 8], behind 64 elements; both are small integers, so sums are exact.
    let body = "THREADGROUP(float, b, 128);
        THREADGROUP(T, d, 64);
        for (uint i = LANE; i < 128; i += 32) b[i] = z[i];
        BARRIER();
        simdgroup_matrix<float, 8, 8> sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
        for (uint k = 0; k < 16; k += 8) {
            simdgroup_matrix<T, 8, 8> left;
            simdgroup_float8x8 right;
            simdgroup_load(left, x, 16, ulong2(k, 0));
            simdgroup_load(right, b, 16, ulong2(k, 0), true);
            simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        simdgroup_matrix<T, 8, 8> rounded;
        for (uint i = 0; i < 2; ++i) rounded.thread_elements()[i] = T(sum.thread_elements()[i]);
        simdgroup_store(rounded, d, 8, ulong2(0, 0), true);
        SIMD_BARRIER();
        for (uint i = LANE; i < 64; i += 32) y[i] = d[i];
        simdgroup_multiply(sum, rounded, rounded);
        BARRIER_DEVICE();
        simdgroup_store(sum, z, 16);
        for (uint i = LANE + 64; i < 128; i += 32) y[i] = T(0.0f);";
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let x: Vec<f32> = (0..128).map(|i| (i * 7 % 5) as f32 - 2.0).collect();
        let b: Vec<f32> = (0..128).map(|i| (i * 11 % 7) as f32 - 3.0).collect();
        let trial = Trial { dtype, n: 128, grid: Grid::line(1, 32), ..TRIAL_OF_64 };
        let [y, z] = trial.run_on(body, &x, &b).unwrap();
        let product = |i: usize, j: usize| 1.0 + (0..16).map(|k| x[16 * i + k] * b[16 * j + k]).sum::<f32>();
        for i in 0..8 {
            for j in 0..8 {
                assert_eq!(y[8 * j + i], product(i, j), "{dtype:?} [{i}, {j}], stored as its transpose");
                let square = (0..8).map(|k| product(i, k) * product(k, j)).sum::<f32>();
                assert_eq!(z[16 * i + j], square, "{dtype:?} [{i}, {j}] of the square");
            }
        }
    }
}
