"""The wire between processes: protobuf definitions and the code generated from them."""
