"""Quantized weights as bitsandbytes and torchao keep them.

weights       what a layer holds as plain data: shape, dtype, how to decode, read and write it
functional    public functions on tensors: products with such a weight and an adapter

The layers that have them are in tuners.lora.bnb, the operators in ops.
"""
