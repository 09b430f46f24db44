//! What is allowed in action policies and hardly meant.
