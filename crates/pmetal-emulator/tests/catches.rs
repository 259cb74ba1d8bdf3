//! What the emulator refuses, one mistake after another.

mod trial;

use candle_core::{DType, Device, Tensor};
use pmetal_metal::Grid;
use trial::{FILE, TRIAL_OF_64, Trial};

impl Trial {
    /// Asserts that `body` is refused with a message that holds `words`.
    #[track_caller]
    fn refuses(&self, body: &str, words: &str) {
        match self.run(body) {
            Ok(_) => panic!("nobody caught {body}"),
            Err(message) => assert!(message.contains(words), "{body}\n{message}\nexpected {words}"),
        }
    }
}

const COPY: &str = "y[THREAD] = x[THREAD];";

#[test]
fn bounds() {
    TRIAL_OF_64.refuses("y[THREAD] = x[THREAD + 1];", "reads x[64], which has 64 elements");
    TRIAL_OF_64.refuses("y[THREAD + 1] = x[THREAD];", "writes y[64], which has 64 elements");
    TRIAL_OF_64.refuses("y[THREAD] = x[int(THREAD) - 1];", "thread 0: reads x[-1]");
    TRIAL_OF_64.refuses("THREADGROUP(float, s, 63);\ns[THREAD] = 0.0f;", "writes s[63], which has 63 elements");
    TRIAL_OF_64.refuses("if (THREAD == 5) store4(y, 64, load4(x, 60));", "thread 5: writes y[64]");
}

#[test]
fn what_was_never_written() {
    let uninitialised = "THREADGROUP(float, s, 64);
        if (THREAD > 0) s[THREAD] = 1.0f;
        BARRIER();
        y[THREAD] = T(s[THREAD]);";
    TRIAL_OF_64.refuses(uninitialised, "thread 0: reads s[0], which nothing has written");
    // What an earlier threadgroup left there is no value.
    let left_over = "THREADGROUP(float, s, 32);
        if (GROUP_X == 0) s[THREAD] = 1.0f;
        BARRIER();
        y[THREAD_IN_GRID] = T(s[THREAD]);";
    Trial { grid: Grid::line(2, 32), ..TRIAL_OF_64 }.refuses(left_over, "threadgroup (1, 0, 0)");
    TRIAL_OF_64.refuses("if (THREAD != 9) y[THREAD] = x[THREAD];", "it never writes y[9] of 64 elements");
    TRIAL_OF_64.refuses("y[THREAD] = T(float(y[THREAD]) + 1.0f);", "which nothing has written");
    TRIAL_OF_64.run("y[THREAD] = x[THREAD];\ny[THREAD] = T(float(y[THREAD]) + 1.0f);").unwrap();
}

#[test]
fn races_in_a_threadgroup() {
    let fill = "THREADGROUP(float, s, 64);\ns[THREAD] = 1.0f;\n";
    let read_after_write = "y[THREAD] = T(s[(THREAD + 1) % 64]);";
    TRIAL_OF_64.run(&format!("{fill}BARRIER();\n{read_after_write}")).unwrap();
    let message = TRIAL_OF_64.run(&format!("{fill}{read_after_write}")).unwrap_err();
    assert!(
        message.contains("race: it reads threadgroup memory") || message.contains("nothing has written"),
        "{message}"
    );
    let across = format!("{fill}SIMD_BARRIER();\n{read_after_write}");
    let message = TRIAL_OF_64.run(&across).unwrap_err();
    assert!(message.contains("race") || message.contains("nothing has written"), "{message}");

    let write_after_read = format!("{fill}BARRIER();\nconst float v = s[(THREAD + 1) % 64];\ns[THREAD] = v;\n{COPY}");
    let message = TRIAL_OF_64.run(&write_after_read).unwrap_err();
    assert!(message.contains("race"), "{message}");
    TRIAL_OF_64.refuses("THREADGROUP(uint, s, 1);\ns[0] = THREAD;", "race: it writes threadgroup memory s[0]");
    // All of a SIMD group read, one writes: a SIMD barrier orders them, but not those of the other group.
    let reuse = format!(
        "THREADGROUP(float, s, 2);\nif (LANE == 0) s[SIMD] = 1.0f;\n{COPY}\nSIMD_BARRIER();\nfloat v = s[SIMD];\n"
    );
    TRIAL_OF_64.run(&format!("{reuse}SIMD_BARRIER();\nif (LANE == 3) s[SIMD] = v;")).unwrap();
    TRIAL_OF_64.refuses(&format!("{reuse}if (LANE == 3) s[SIMD] = v;"), "race");
    TRIAL_OF_64.refuses(&format!("{reuse}v = s[0];\nSIMD_BARRIER();\nif (THREAD == 3) s[0] = v;"), "race");
}

#[test]
fn races_in_device_memory() {
    let exchange = |barrier: &str| format!("{COPY}\nz[THREAD] = 1.0f;\n{barrier}\nz[63 - THREAD] += 1.0f;");
    TRIAL_OF_64.run(&exchange("BARRIER_DEVICE();")).unwrap();
    TRIAL_OF_64.refuses(&exchange(""), "race");
    TRIAL_OF_64.refuses(&exchange("BARRIER();"), "race: it reads device memory z");
    TRIAL_OF_64.refuses(&exchange("SIMD_BARRIER();"), "race");
    let read_then_write =
        |barrier: &str| format!("{COPY}\nfloat v = z[32 * SIMD];\n{barrier}\nif (LANE == 1) z[32 * SIMD] = v;");
    TRIAL_OF_64.run(&read_then_write("BARRIER_DEVICE();")).unwrap();
    TRIAL_OF_64.refuses(&read_then_write("SIMD_BARRIER();"), "which another thread read");

    let two = Trial { grid: Grid::line(2, 32), ..TRIAL_OF_64 };
    let copy = "y[THREAD_IN_GRID] = x[THREAD_IN_GRID];";
    two.refuses(&format!("{copy}\nz[THREAD] = 1.0f;"), "which another threadgroup (number 0) wrote");
    two.refuses(
        &format!("{copy}\nif (GROUP_X == 0) z[THREAD] = 1.0f;\nelse z[THREAD + 32] = z[THREAD];"),
        "(number 0) wrote",
    );
    two.refuses(
        &format!("{copy}\nif (GROUP_X == 1) z[3] = 1.0f;\nelse z[THREAD + 32] = z[THREAD];"),
        "(number 0) read",
    );
    two.run(&format!("{copy}\nz[THREAD_IN_GRID] += z[THREAD_IN_GRID];")).unwrap();
}

#[test]
fn threads_that_wait_for_each_other() {
    TRIAL_OF_64.refuses(&format!("{COPY}\nif (THREAD < 10) BARRIER();"), "threads 0 to 9 wait in BARRIER in line");
    TRIAL_OF_64.refuses(&format!("{COPY}\nif (THREAD < 10) return;\nBARRIER();"), "threads 0 to 9 have ended");
    TRIAL_OF_64.refuses(&format!("{COPY}\nif (THREAD < 10) BARRIER();\nelse BARRIER();"), "barrier divergence");
    TRIAL_OF_64.refuses("y[THREAD] = T(THREAD == 40 ? 0.0f : simd_sum(1.0f));", "wait in simd_sum");
    TRIAL_OF_64.refuses("y[THREAD] = T(LANE < 16 ? simd_max(1.0f) : simd_sum(1.0f));", "SIMD divergence");
    TRIAL_OF_64.refuses(
        &format!("{COPY}\nif (SIMD == 0) BARRIER();\nelse simd_sum(1.0f);\nif (LANE == 0) BARRIER();"),
        "divergence",
    );
    TRIAL_OF_64.run(&format!("{COPY}\nif (SIMD == 0) simd_sum(1.0f);")).unwrap();
    TRIAL_OF_64.refuses("y[THREAD] = T(simd_shuffle(1.0f, LANE + 1));", "simd_shuffle from lane 32");
    let matrix = "simdgroup_float8x8 m;\nsimdgroup_load(m, z + LANE / 16);\nsimdgroup_store(m, z);";
    TRIAL_OF_64.refuses(matrix, "different matrices");
}

#[test]
fn four_at_once_only_where_aligned() {
    TRIAL_OF_64.refuses("load4(x, THREAD / 16 + 1);", "which is not aligned to four");
    TRIAL_OF_64.refuses("store4(z + 2, 4, load4(x, 0));", "writes four elements at z[6]");
    // The second row of a tensor of width 66 begins two elements behind a multiple of four.
    for dtype in [DType::F32, DType::BF16] {
        let rows = Tensor::zeros((2, 66), dtype, &Device::Cpu).unwrap();
        let y = Tensor::zeros(64, dtype, &Device::Cpu).unwrap();
        let z = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
        let run = |start: usize| {
            let x = rows.get(1).unwrap().narrow(0, start, 64).unwrap();
            Trial { dtype, ..TRIAL_OF_64 }.run_tensors(
                "if (THREAD < 16) store4(y, 4 * THREAD, load4(x, 4 * THREAD));",
                &x,
                &y,
                &z,
            )
        };
        assert!(run(0).unwrap_err().contains("which is not aligned to four"));
        run(2).unwrap();
    }
}

#[test]
fn eight_at_once_only_where_aligned() {
    TRIAL_OF_64.refuses("load8(x, 4);", "reads eight elements at x[4], which is not aligned to eight");
    TRIAL_OF_64.refuses("store8(z, 12, load8(x, 0));", "writes eight elements at z[12]");
    TRIAL_OF_64.run("if (THREAD < 8) store8(y, 8 * THREAD, load8(x, 8 * THREAD));").unwrap();
}

/// Columns 3 to 66 of four rows of 70, and those before them.
#[test]
fn columns_between_rows_are_not_the_tensors() {
    let whole = |seed: f32| {
        let count: Vec<f32> = (0..280).map(|i| seed + i as f32).collect();
        Tensor::from_vec(count, (4, 70), &Device::Cpu).unwrap()
    };
    let (x, y, z) = (whole(0.0), whole(1000.0), Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap());
    let columns = |t: &Tensor| t.narrow(1, 3, 64).unwrap();
    let run = |body: &str, y: &Tensor| TRIAL_OF_64.run_tensors(body, &columns(&x), y, &z);
    let rows = "for (uint row = 0; row < 4; ++row) y[70 * row + THREAD] = x[70 * row + THREAD];\n";
    run(rows, &columns(&y)).unwrap();
    assert_eq!(columns(&y).to_vec2::<f32>().unwrap(), columns(&x).to_vec2::<f32>().unwrap());
    for column in [0, 1, 2, 67, 68, 69] {
        let left: Vec<f32> = y.narrow(1, column, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(left, [0, 70, 140, 210].map(|row| (1000 + row + column) as f32));
    }
    let refused = |body: &str, y: &Tensor, words: &str| {
        let message = run(body, y).unwrap_err();
        assert!(message.contains(words), "{body}\n{message}\nexpected {words}");
    };
    refused(&format!("{rows}y[64] = T(0.0f);"), &columns(&y), "writes y[64], which lies between its rows");
    refused(&format!("{rows}y[0] = x[139];"), &columns(&y), "reads x[139], which lies between its rows");
    refused("y[THREAD] = x[THREAD];", &columns(&y), "it never writes y[70]");
    // column ranges of one matrix are each other's neighbours, unless they overlap
    let halves = "for (uint row = 0; row < 4; ++row) y[70 * row + THREAD % 3] = x[70 * row + THREAD];\n";
    run(&halves.replace("y[", "if (THREAD < 3) y["), &x.narrow(1, 0, 3).unwrap()).unwrap();
    run(&halves.replace("y[", "if (THREAD < 3) y["), &x.narrow(1, 67, 3).unwrap()).unwrap();
    refused(rows, &x.narrow(1, 66, 4).unwrap(), "y is shared with x");
    refused(rows, &x.narrow(1, 0, 4).unwrap(), "y is shared with x");
}

#[test]
fn what_does_not_fit() {
    TRIAL_OF_64.refuses("THREADGROUP(float, a, 8000);\nTHREADGROUP(float, b, 200);", "more than 32 KiB");
    Trial { grid: Grid::line(1, 48), ..TRIAL_OF_64 }.refuses(COPY, "48 threads in a threadgroup");
    let x = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
    let y = Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap();
    let shared = TRIAL_OF_64.run_tensors(COPY, &x, &y, &x).unwrap_err();
    assert!(shared.contains("z is shared with x"), "{shared}");
}

#[test]
fn what_does_not_compile() {
    // Each beside the nearest that does, so that it is refused for the mistake alone.
    let refuses = |functions: &'static str, wrong: &str, right: &str| {
        let trial = Trial { functions, dtype: DType::BF16, ..TRIAL_OF_64 };
        let compile = |body: &str| trial.emulator(body).compile(FILE, trial.dtype).map_err(|e| e.to_string());
        compile(right).unwrap();
        assert!(compile(wrong).is_err_and(|message| message.contains("does not compile")), "nobody caught {wrong}");
    };
    // Memory that is only read, and address spaces.
    refuses("", "x[THREAD] = T(1.0f);", "y[THREAD] = T(1.0f);");
    refuses("", "DEVICE_PTR(T) p = x;", "DEVICE_PTR(const T) p = x;");
    refuses("", "DEVICE_PTR(const T) p = z;", "DEVICE_PTR(const T) p = y;");
    refuses("", "params.n = 1;", "uint n = params.n;\nn = 1;");
    let s = "THREADGROUP(float, s, 64);\n";
    refuses("", &format!("{s}DEVICE_PTR(float) p = s;"), &format!("{s}THREADGROUP_PTR(float) p = s;"));
    let first = "FUNCTION float first(THREADGROUP_PTR(float) p) { return p[0]; }";
    refuses(first, &format!("{s}z[0] = first(z);"), &format!("{s}z[0] = first(s);"));
    refuses(first, &format!("{s}float own[4];\nz[0] = first(own);"), &format!("{s}float own[4];\nz[0] = first(s);"));
    let put = "FUNCTION void put(THREAD_REF(float) v) { v = 1.0f; }";
    refuses(put, &format!("{s}float v = 0.0f;\nput(s[0]);"), &format!("{s}float v = 0.0f;\nput(v);"));
    // A function does not see what the kernel is given.
    refuses("FUNCTION uint twice(uint lane) { return lane + lane; }", "twice(lane);", "twice(LANE);");
    let lane = Trial { functions: "FUNCTION uint lane() { return LANE; }", ..TRIAL_OF_64 };
    assert!(lane.emulator("").compile(FILE, DType::F32).is_err());
    // Numbers.
    refuses("", "y[0] = x[0] + x[0];", "y[0] = T(float(x[0]) + float(x[0]));");
    refuses("", "y[0] = 1.0f;", "y[0] = T(1.0f);");
    refuses("", "const float v = x[0];", "const float v = float(x[0]);");
    refuses("", "const half v = half(x[0]);", "const half v = half(float(x[0]));");
    refuses("", "z[0] = exp(x[0]);", "z[0] = exp(float(x[0]));");
    refuses("", "z[0] = z[0] * 0.5;", "z[0] = z[0] * 0.5f;");
    refuses("", "z[0] = min(1.5f, 1.0f);", "z[0] = fmin(1.5f, 1.0f);");
    refuses("", "float4 v = load4(x, 0);\nv = v + v;", "float4 v = load4(x, 0);\nv.x = v.x + v.y;");
    // An element's name would be read later than where it is written.
    refuses("", "auto v = z[0];\nz[1] = v;", "const float v = z[0];\nz[1] = v;");
}
