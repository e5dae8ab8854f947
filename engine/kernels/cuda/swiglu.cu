// The gated activation, forward and backward. See swiglu.rs.
#include "prelude.cuh"

template <int N> __device__ void forward(const E* gate_up, E* act, i64 count, int inter) {
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N; i < count; i += (i64)gridDim.x * blockDim.x * N) {
        const E* gates = gate_up + i / inter * 2 * inter + i % inter;
        Pack<E, N> gate = load<E, N>(gates), up = load<E, N>(gates + inter);
#pragma unroll
        for (int j = 0; j < N; j++) gate.at[j] = gated(gate.at[j], up.at[j]);
        store<E, N>(act + i, gate);
    }
}

// act = silu(gate) * up; count: elements of act.
extern "C" __global__ void swiglu(const E* gate_up, E* act, i64 count, int inter) {
    wait_for_earlier();
    if (inter % WIDE == 0) {
        forward<WIDE>(gate_up, act, count, inter);
    } else {
        forward<1>(gate_up, act, count, inter);
    }
}

template <int N> __device__ void backward(const E* gate_up, const E* d_act, E* d_gate_up, E* act, i64 count, int inter) {
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * N; i < count; i += (i64)gridDim.x * blockDim.x * N) {
        i64 at = i / inter * 2 * inter + i % inter;
        Pack<E, N> gate = load<E, N>(gate_up + at), up = load<E, N>(gate_up + at + inter), d = load<E, N>(d_act + i), out;
#pragma unroll
        for (int j = 0; j < N; j++) {
            float g = to_float(gate.at[j]), u = to_float(up.at[j]), dj = to_float(d.at[j]), s = sigmoid(g);
            out.at[j] = from_float<E>(g * s * u);
            gate.at[j] = from_float<E>(dj * u * s * (1.0f + g * (1.0f - s)));
            up.at[j] = from_float<E>(dj * g * s);
        }
        store<E, N>(d_gate_up + at, gate);
        store<E, N>(d_gate_up + at + inter, up);
        if (act) store<E, N>(act + i, out);
    }
}

// d_gate_up may be gate_up. act may be null; else it gets the forward step's bits.
extern "C" __global__ void swiglu_backward(const E* gate_up, const E* d_act, E* d_gate_up, E* act, i64 count, int inter) {
    wait_for_earlier();
    if (inter % WIDE == 0) {
        backward<WIDE>(gate_up, d_act, d_gate_up, act, count, inter);
    } else {
        backward<1>(gate_up, d_act, d_gate_up, act, count, inter);
    }
}
