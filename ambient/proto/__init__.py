"""Wire messages generated from the .proto files here (make proto)."""
