"""Laws that hold a device against the CPU; test_pretend_device.py runs them on both."""
