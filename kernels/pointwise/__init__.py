"""Operations on one row or one element at a time. Imports core."""
