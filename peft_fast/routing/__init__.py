"""Which adapters there are, and which of them each row of a call uses.

batch         the rows of a call and their slots, from the model's input to the last layer
bank          adapters in slots of a table on the device; more of them than slots wait on the host
record        what the bank keeps of one adapter
watch         whether an adapter's tensors are those that were read
slot_tables   addresses, ranks and scales of the slots, as kernels read them

Here is no layer and no model: those are in tuners and peft_model, and ask.
"""
