//! Captured graphs: they do what their launches do, with what their inputs hold when they are launched, and own their memory.

use crate::{bench, uniform};
use half::bf16;
use perilune::kernels::cuda::device::Device;
use perilune::kernels::cuda::embedding::embed;
use perilune::kernels::cuda::graph::{Graph, Memory};
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::kernels::cuda::swiglu::swiglu;
use std::sync::Arc;

/// Wide enough that the two sizes of buffers below are of two classes.
const HIDDEN: usize = 1024;

/// Rows of a table by number, then their SwiGLU, through a buffer in between.
fn work(device: &Arc<Device>, table: &DeviceBuffer<bf16>, ids: &DeviceBuffer<i32>) -> perilune::error::Result<DeviceBuffer<bf16>> {
    let mut rows = DeviceBuffer::scratch(device, "test", ids.len() * HIDDEN)?;
    embed(device, table.view(), HIDDEN, ids.view(), rows.view_mut())?;
    let mut copy = DeviceBuffer::scratch(device, "test", rows.len())?;
    copy.copy_from(rows.view())?;
    drop(rows);
    let mut out = DeviceBuffer::scratch(device, "test", ids.len() * HIDDEN / 2)?;
    swiglu(device, copy.view(), HIDDEN / 2, out.view_mut())?;
    Ok(out)
}

#[test]
fn a_graph_does_what_its_launches_do() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let table = DeviceBuffer::copy_of(&device, "test", &uniform::<bf16>(1, 10 * HIDDEN)).unwrap();
    let mut ids = DeviceBuffer::copy_of(&device, "test", &[3, 0, 9]).unwrap();
    let want: Vec<Vec<bf16>> = [[3, 0, 9], [1, 1, 2]]
        .iter()
        .map(|chosen| {
            ids.upload(chosen).unwrap();
            work(&device, &table, &ids).unwrap().to_vec().unwrap()
        })
        .collect();
    let memory = Memory::new(&device);
    let (graph, out) = Graph::capture(&memory, "test", || work(&device, &table, &ids)).unwrap();
    for (chosen, want) in [[1, 1, 2], [3, 0, 9], [1, 1, 2]].iter().zip([&want[1], &want[0], &want[1]]) {
        ids.upload(chosen).unwrap();
        graph.launch("test").unwrap();
        // Others take and write memory between two launches.
        let mut other = DeviceBuffer::<bf16>::scratch(&device, "test", ids.len() * HIDDEN).unwrap();
        other.fill_bytes(0xff).unwrap();
        assert!(out.to_vec().unwrap() == *want, "{chosen:?}");
    }
}

#[test]
fn the_memory_of_graphs_is_lent_to_nobody_else_while_they_live() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let table = DeviceBuffer::copy_of(&device, "test", &uniform::<bf16>(1, 10 * HIDDEN)).unwrap();
    let ids = DeviceBuffer::copy_of(&device, "test", &[3, 0, 9]).unwrap();
    drop(work(&device, &table, &ids).unwrap());
    let warm = device.memory_statistics();
    let memory = Memory::new(&device);
    let (first, out) = Graph::capture(&memory, "test", || work(&device, &table, &ids)).unwrap();
    let one = device.memory_statistics();
    assert_eq!(one.driver_calls, warm.driver_calls, "what was warm is taken again");
    assert_eq!(one.live_bytes + one.free_bytes, warm.live_bytes + warm.free_bytes);
    assert!(one.free_bytes < warm.free_bytes);
    // The captured result lives on, so a second one is new; all else is shared with the first graph.
    let (second, again) = Graph::capture(&memory, "test", || work(&device, &table, &ids)).unwrap();
    assert_eq!(device.memory_statistics().driver_calls, warm.driver_calls + 1);
    let others: Vec<_> = (0..3).map(|_| DeviceBuffer::<bf16>::scratch(&device, "test", ids.len() * HIDDEN).unwrap()).collect();
    assert_eq!(device.memory_statistics().driver_calls, warm.driver_calls + 4);
    // Results may outlive their graph.
    drop((others, first, second, memory, out, again));
    let empty = device.memory_statistics();
    assert_eq!(empty.live_bytes, warm.live_bytes);
    drop((table, ids));
    device.release_free_memory().unwrap();
    let nothing = device.memory_statistics();
    assert_eq!((nothing.live_bytes, nothing.free_bytes), (0, 0));
}

#[test]
fn what_cannot_be_captured_is_named_and_does_no_harm() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let table = DeviceBuffer::copy_of(&device, "test", &uniform::<bf16>(1, 10 * HIDDEN)).unwrap();
    let mut ids = DeviceBuffer::copy_of(&device, "test", &[3, 0, 9]).unwrap();
    let memory = Memory::new(&device);
    let capture = |work: &mut dyn FnMut() -> perilune::error::Result<()>| Graph::capture(&memory, "test", work).err().unwrap().to_string();
    // On a device of its own no kernel has been used yet.
    let error = capture(&mut || work(&device, &table, &ids).map(drop));
    assert!(error.starts_with("embedding:") && error.contains("the first use of a kernel cannot be part of a captured graph"), "{error}");
    let error = capture(&mut || ids.upload(&[0, 1, 2]));
    assert!(error.starts_with("upload:") && error.contains("a copy to or from the host"), "{error}");
    let error = capture(&mut || table.to_vec().map(drop));
    assert!(error.starts_with("download:"), "{error}");
    let error = capture(&mut || device.synchronize());
    assert!(error.starts_with("synchronize:"), "{error}");
    let captured = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| capture(&mut || panic!("on purpose"))));
    assert!(captured.is_err());
    // The device and the thread go on as if nothing had been.
    let want = work(&device, &table, &ids).unwrap().to_vec().unwrap();
    let (graph, out) = Graph::capture(&memory, "test", || work(&device, &table, &ids)).unwrap();
    graph.launch("test").unwrap();
    assert!(out.to_vec().unwrap() == want);
}

/// While one thread captures, another works on the same device, and its work is done, not captured.
#[test]
fn other_threads_work_on_while_one_captures() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let table = DeviceBuffer::copy_of(&device, "test", &uniform::<bf16>(1, 10 * HIDDEN)).unwrap();
    let ids = DeviceBuffer::copy_of(&device, "test", &[3, 0, 9]).unwrap();
    let want = work(&device, &table, &ids).unwrap().to_vec().unwrap();
    let memory = Memory::new(&device);
    let (graph, out) = Graph::capture(&memory, "test", || {
        let out = work(&device, &table, &ids)?;
        std::thread::scope(|scope| {
            let other = scope.spawn(|| work(&device, &table, &ids).unwrap().to_vec().unwrap());
            assert!(other.join().unwrap() == want);
        });
        Ok(out)
    })
    .unwrap();
    graph.launch("test").unwrap();
    assert!(out.to_vec().unwrap() == want);
}
