/* A reader of JSON as strict as the standard: no comments, no trailing commas, no name twice, nothing behind. */
#ifndef JSON_H
#define JSON_H

#include <stddef.h>

enum json_kind { JSON_OBJECT, JSON_ARRAY, JSON_STRING, JSON_NUMBER, JSON_TRUE, JSON_FALSE, JSON_NULL };

struct json {
    enum json_kind kind;
    char *name;         /* inside an object */
    char *text;         /* of a string or number; a string with a NUL inside is refused */
    struct json *child; /* first member or element */
    struct json *next;  /* in the same object or array */
};

/* NULL with the reason and the place when `text` is not one JSON value. */
struct json *json_parse(const char *text, char *reason, size_t reason_size);
void json_free(struct json *value);

/* The member of an object, or NULL. */
const struct json *json_member(const struct json *object, const char *name);
size_t json_length(const struct json *value);
const char *json_kind_name(enum json_kind kind);

#endif
