//! The allocator, the copies and the errors of a device.

use crate::{bench, uniform};
use half::bf16;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::cuda::behind::Mark;
use perilune::kernels::cuda::device::{Device, Settings};
use perilune::kernels::cuda::embedding::embed;
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::tensor::parameter::{Layout, Parameter};
use perilune::tensor::{AnyTensor, Place, Tensor};

/// A device of its own on the same GPU, whose memory no other test counts in.
fn own(memory_bytes_max: usize) -> Option<std::sync::Arc<Device>> {
    bench()?;
    Some(Device::open_with(0, Settings { memory_bytes_max, keeps_kernels: false, ..Settings::default() }).unwrap())
}

#[test]
fn copies_come_back_whole_whatever_their_size() {
    let Some(bench) = bench() else { return };
    // More than all slots of pinned memory together (16 MiB).
    for count in [0, 1, 7, 1 << 20, (5 << 20) + 3] {
        let values = uniform::<f32>(1, count);
        let buffer = bench.upload(&values);
        assert_eq!(buffer.to_vec().unwrap(), values);
        let mut copy = bench.poisoned::<f32>(count);
        copy.copy_from(buffer.view()).unwrap();
        assert!(copy.to_vec().unwrap() == values);
    }
}

#[test]
fn freed_memory_is_taken_again() {
    let Some(device) = own(usize::MAX) else { return };
    let first = DeviceBuffer::<f32>::scratch(&device, "a", 100_000).unwrap();
    let other = DeviceBuffer::<f32>::scratch(&device, "b", 10).unwrap();
    let before = device.memory_statistics();
    assert_eq!((before.driver_calls, before.free_bytes), (2, 0));
    assert!(before.live_bytes >= 400_040 && before.live_bytes < 500_000, "{before:?}");
    drop(first);
    let again = DeviceBuffer::<f32>::scratch(&device, "c", 99_000).unwrap();
    let after = device.memory_statistics();
    assert_eq!((after.driver_calls, after.reuses, after.free_bytes, after.live_bytes), (2, 1, 0, before.live_bytes));
    drop((again, other));
    let empty = device.memory_statistics();
    assert_eq!((empty.live_bytes, empty.live_bytes_max, empty.free_bytes), (0, before.live_bytes, before.live_bytes));
    device.release_free_memory().unwrap();
    assert_eq!(device.memory_statistics().free_bytes, 0);
}

#[test]
fn running_out_of_memory_names_the_largest_holders() {
    let Some(device) = own(64 << 20) else { return };
    let _weights = DeviceBuffer::<f32>::scratch(&device, "weights", 8 << 20).unwrap();
    let _moments = DeviceBuffer::<f32>::scratch(&device, "moments", 4 << 20).unwrap();
    drop(DeviceBuffer::<f32>::scratch(&device, "activations", 2 << 20).unwrap());
    // What waits makes room first.
    let fits = DeviceBuffer::<f32>::scratch(&device, "logits", 3 << 20).unwrap();
    drop(fits);
    let Err(error) = DeviceBuffer::<f32>::scratch(&device, "logits", 16 << 20) else { panic!("64 MiB cannot hold 112") };
    let error = error.to_string();
    let (weights, moments) = (error.find("weights 33.6 MB").unwrap(), error.find("moments 16.8 MB").unwrap());
    assert!(error.contains("out of memory: 67.1 MB wanted for logits") && weights < moments && !error.contains("activations"), "{error}");
}

#[test]
fn what_is_read_behind_a_mark_is_what_was_there() {
    let Some(device) = own(usize::MAX) else { return };
    // More than all slots of pinned memory, and less than one.
    for count in [5 << 20, 100] {
        let (old, new) = (uniform::<f32>(1, count), uniform::<f32>(2, count));
        let mut live = DeviceBuffer::copy_of(&device, "live", &old).unwrap();
        let image = live.try_clone().unwrap();
        let mark = Mark::now(&device).unwrap();
        live.upload(&new).unwrap();
        let seen = std::thread::scope(|scope| {
            let read = scope.spawn(move || {
                // Memory that is taken behind the mark was the first stream's a moment ago.
                let seen = mark.work_behind(|| image.try_clone()?.to_vec()).unwrap();
                drop(image);
                seen
            });
            // The first stream goes on, over whatever memory is free.
            for _ in 0..3 {
                DeviceBuffer::<f32>::scratch(&device, "other", count).unwrap().fill_bytes(0xff).unwrap();
            }
            read.join().unwrap()
        });
        assert!(seen == old && live.to_vec().unwrap() == new);
    }
}

#[test]
fn a_full_device_waits_for_what_is_read_behind_a_mark() {
    let Some(device) = own(64 << 20) else { return };
    let image = DeviceBuffer::<u8>::zeroed(&device, "image", 32 << 20).unwrap();
    let mark = Mark::now(&device).unwrap();
    let (begin, begun) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        begun.recv().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let bytes = mark.work_behind(|| image.to_vec()).unwrap();
        drop(image);
        bytes.len()
    });
    begin.send(()).unwrap();
    assert_eq!(DeviceBuffer::<u8>::scratch(&device, "activations", 48 << 20).unwrap().len(), 48 << 20);
    assert_eq!(reader.join().unwrap(), 32 << 20);
    assert!(DeviceBuffer::<u8>::scratch(&device, "activations", 65 << 20).is_err(), "nothing is read any more");
}

#[test]
fn a_lost_device_says_so_from_then_on() {
    // On a GPU this would take the device from all other tests of the process.
    let Some(device) = own(usize::MAX).filter(|_| bench().is_some_and(|bench| bench.is_emulated())) else { return };
    let weight = DeviceBuffer::copy_of(&device, "test", &[1.0f32; 8]).unwrap();
    let ids = DeviceBuffer::copy_of(&device, "test", &[0, 2]).unwrap();
    let mut out = DeviceBuffer::<f32>::scratch(&device, "test", 8).unwrap();
    // A table of two rows has no row 2: the kernel stops, which shows when somebody waits for it.
    embed(&device, weight.view(), 4, ids.view(), out.view_mut()).unwrap();
    let error = out.to_vec().unwrap_err().to_string();
    assert!(error.starts_with("download:") && error.contains("lost") && error.contains("perilune resume"), "{error}");
    let again = out.upload(&[0.0; 8]).unwrap_err().to_string();
    assert!(again.starts_with("upload:") && again.contains("cuEventSynchronize"), "the first reason is told again: {again}");
}

#[test]
fn a_device_that_is_not_there_is_named() {
    if bench().is_none() {
        return;
    }
    let Err(error) = Device::open(63) else { panic!("no machine has 64 GPUs") };
    assert!(error.to_string().contains("no cuda:63"), "{error}");
}

#[test]
fn a_full_device_is_an_error_to_who_copies_on_it() {
    let Some(device) = own(32 << 20) else { return };
    let place = Place::Cuda(device.clone());
    let weight = Parameter::<bf16>::zeros_at(&place, "w", 1024, 2048, Layout::Rows).unwrap();
    weight.write_rows(0..1024, &vec![0.3; 1024 * 2048], true).unwrap();
    weight.set_trains(false);
    let copy = weight.copy().unwrap();
    let x = Tensor::<f32, 1>::from_slice([1 << 20], &vec![1.0; 1 << 20]).unwrap();
    let leaf: Tensor<f32, 1> = AnyTensor::from(x).to_place(&place).unwrap().leaf().unwrap().typed("test", "x").unwrap();
    leaf.backward_with(Buffer::zeroed(1 << 20)).unwrap();
    let rest = DeviceBuffer::<u8>::scratch(&device, "rest", device.memory_bytes_free() as usize / 16 * 15).unwrap();
    let full = |what: &str, result: perilune::error::Result<()>| {
        let error = result.expect_err(what).to_string();
        assert!(error.contains("out of memory"), "{what}: {error}");
    };
    full("gradient", leaf.gradient().map(drop));
    full("drop_master", weight.drop_master());
    full("clear_training_state", weight.clear_training_state());
    assert!(weight.has_remainder(), "what cannot be done changes nothing");
    drop(rest);
    weight.drop_master().unwrap();
    assert!(!weight.has_remainder() && copy.has_remainder());
    assert_eq!(leaf.gradient().unwrap().unwrap().len(), 1 << 20);
}
