#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    pmetal_fuzz::config(data);
});
