//! Marks on a stream, by CUDA events.

use std::sync::Arc;

use candle_core::cuda_backend::{
    WrapErr,
    cudarc::driver::{CudaEvent, CudaStream, sys::CUevent_flags},
};
use pmetal_metal::{Marks, Result};

/// Marks on one stream. The device writes down when it passes them; the host goes on.
pub(super) struct EventMarks {
    stream: Arc<CudaStream>,
    events: Vec<CudaEvent>,
}

impl EventMarks {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Self {
        Self { stream: stream.clone(), events: Vec::new() }
    }
}

impl Marks for EventMarks {
    fn mark(&mut self) -> Result<()> {
        let event = self.stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?;
        event.record(&self.stream).w()?;
        self.events.push(event);
        Ok(())
    }

    fn seconds(&self) -> Result<Vec<f64>> {
        // the driver tells an f32, in which small differences are exact and large ones are not
        let mut passed = 0.0;
        let mut seconds = vec![passed; self.events.len().min(1)];
        for pair in self.events.windows(2) {
            passed += f64::from(pair[0].elapsed_ms(&pair[1]).w()?) * 1e-3;
            seconds.push(passed);
        }
        Ok(seconds)
    }
}
