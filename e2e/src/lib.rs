//! The shop in one process, under test, with its bus and its clock in the hands of the test.
