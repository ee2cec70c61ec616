"""Quantized weights as bitsandbytes and torchao keep them, seen as plain data: shape, dtype, how to decode.

The layers that have them are in tuners.lora.bnb; the products with them in ops.
"""
