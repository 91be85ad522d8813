#include "json.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEPTH_MAX 32

struct reader {
    const char *start;
    const char *at;
    int depth;
    char *reason;
    size_t reason_size;
};

static struct json *read_value(struct reader *r);

static void *refuse(struct reader *r, const char *what)
{
    if (r->reason[0] == '\0')
        snprintf(r->reason, r->reason_size, "%s at character %td", what, r->at - r->start);
    return NULL;
}

static void skip_blanks(struct reader *r)
{
    while (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')
        r->at++;
}

static struct json *new_value(struct reader *r, enum json_kind kind)
{
    struct json *value = calloc(1, sizeof *value);
    if (value == NULL)
        return refuse(r, "no memory");
    value->kind = kind;
    return value;
}

void json_free(struct json *value)
{
    while (value != NULL) {
        struct json *next = value->next;
        json_free(value->child);
        free(value->name);
        free(value->text);
        free(value);
        value = next;
    }
}

static int hex_digits(struct reader *r, unsigned *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        char c = *r->at;
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return refuse(r, "four hexadecimal digits expected"), -1;
        *code = *code * 16 + (unsigned)digit;
    }
    return 0;
}

static size_t put_utf8(char *out, unsigned code)
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (char)(0xE0 | code >> 12);
        out[1] = (char)(0x80 | (code >> 6 & 0x3F));
        out[2] = (char)(0x80 | (code & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | code >> 18);
    out[1] = (char)(0x80 | (code >> 12 & 0x3F));
    out[2] = (char)(0x80 | (code >> 6 & 0x3F));
    out[3] = (char)(0x80 | (code & 0x3F));
    return 4;
}

/* The character behind `\u`, both halves of a pair; 0 when refused. */
static unsigned read_unicode(struct reader *r)
{
    unsigned code, low;
    if (hex_digits(r, &code))
        return 0;
    if (code == 0 || (code >= 0xDC00 && code <= 0xDFFF))
        return refuse(r, "this character is not allowed"), 0;
    if (code < 0xD800 || code > 0xDBFF)
        return code;
    if (r->at[0] != '\\' || r->at[1] != 'u')
        return refuse(r, "half of a surrogate pair"), 0;
    r->at += 2;
    if (hex_digits(r, &low))
        return 0;
    if (low < 0xDC00 || low > 0xDFFF)
        return refuse(r, "half of a surrogate pair"), 0;
    return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
}

static unsigned read_escape(struct reader *r)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = *r->at;
    if (c == 'u') {
        r->at++;
        return read_unicode(r);
    }
    const char *found = c == '\0' ? NULL : strchr(from, c);
    if (found == NULL)
        return refuse(r, "unknown escape"), 0;
    r->at++;
    return (unsigned char)to[found - from];
}

static char *read_string(struct reader *r)
{
    if (*r->at != '"')
        return refuse(r, "string expected");
    r->at++;
    char *text = malloc(strlen(r->at) + 1); /* an escape is never shorter than its character */
    if (text == NULL)
        return refuse(r, "no memory");
    size_t length = 0;
    while (*r->at != '"') {
        if ((unsigned char)*r->at < 0x20) {
            refuse(r, *r->at == '\0' ? "string without end" : "control character in a string");
            free(text);
            return NULL;
        }
        if (*r->at != '\\') {
            text[length++] = *r->at++;
            continue;
        }
        r->at++;
        unsigned code = read_escape(r);
        if (code == 0) {
            free(text);
            return NULL;
        }
        length += put_utf8(text + length, code);
    }
    r->at++;
    text[length] = '\0';
    return text;
}

static const char *skip_digits(const char *at)
{
    while (*at >= '0' && *at <= '9')
        at++;
    return at;
}

static struct json *read_number(struct reader *r)
{
    const char *from = r->at, *at = from;
    if (*at == '-')
        at++;
    if (*at < '0' || *at > '9')
        return refuse(r, "value expected");
    at = *at == '0' ? at + 1 : skip_digits(at);
    if (*at == '.') {
        const char *fraction = at + 1;
        at = skip_digits(fraction);
        if (at == fraction)
            return refuse(r, "digit expected behind the point");
    }
    if (*at == 'e' || *at == 'E') {
        const char *exponent = at + 1 + (at[1] == '+' || at[1] == '-');
        at = skip_digits(exponent);
        if (at == exponent)
            return refuse(r, "digit expected in the exponent");
    }
    struct json *value = new_value(r, JSON_NUMBER);
    if (value == NULL)
        return NULL;
    r->at = at;
    value->text = strndup(from, (size_t)(at - from));
    if (value->text != NULL)
        return value;
    free(value);
    return refuse(r, "no memory");
}

static struct json *read_word(struct reader *r, const char *word, enum json_kind kind)
{
    size_t length = strlen(word);
    if (strncmp(r->at, word, length) != 0)
        return refuse(r, "value expected");
    r->at += length;
    return new_value(r, kind);
}

/* One member of an object or element of an array. */
static struct json *read_item(struct reader *r, const struct json *container)
{
    char *name = NULL;
    skip_blanks(r);
    if (container->kind == JSON_OBJECT) {
        name = read_string(r);
        if (name == NULL)
            return NULL;
        skip_blanks(r);
        if (json_member(container, name) != NULL || *r->at != ':') {
            refuse(r, *r->at != ':' ? "':' expected" : "name given twice");
            free(name);
            return NULL;
        }
        r->at++;
    }
    struct json *value = read_value(r);
    if (value == NULL)
        free(name);
    else
        value->name = name;
    return value;
}

static struct json *read_container(struct reader *r, enum json_kind kind, char end)
{
    struct json *container = new_value(r, kind);
    if (container == NULL)
        return NULL;
    struct json **last = &container->child;
    r->at++;
    skip_blanks(r);
    if (*r->at == end) {
        r->at++;
        return container;
    }
    for (;;) {
        struct json *item = read_item(r, container);
        if (item == NULL)
            break;
        *last = item;
        last = &item->next;
        skip_blanks(r);
        if (*r->at == end) {
            r->at++;
            return container;
        }
        if (*r->at != ',') {
            refuse(r, "',' or the end of the container expected");
            break;
        }
        r->at++;
    }
    json_free(container);
    return NULL;
}

static struct json *read_value(struct reader *r)
{
    skip_blanks(r);
    if (r->depth == DEPTH_MAX)
        return refuse(r, "too deep");
    r->depth++;
    struct json *value;
    switch (*r->at) {
    case '{':
        value = read_container(r, JSON_OBJECT, '}');
        break;
    case '[':
        value = read_container(r, JSON_ARRAY, ']');
        break;
    case '"':
        value = new_value(r, JSON_STRING);
        if (value != NULL && (value->text = read_string(r)) == NULL) {
            json_free(value);
            value = NULL;
        }
        break;
    case 't':
        value = read_word(r, "true", JSON_TRUE);
        break;
    case 'f':
        value = read_word(r, "false", JSON_FALSE);
        break;
    case 'n':
        value = read_word(r, "null", JSON_NULL);
        break;
    default:
        value = read_number(r);
    }
    r->depth--;
    return value;
}

struct json *json_parse(const char *text, char *reason, size_t reason_size)
{
    struct reader r = {.start = text, .at = text, .reason = reason, .reason_size = reason_size};
    reason[0] = '\0';
    struct json *value = read_value(&r);
    if (value == NULL)
        return NULL;
    skip_blanks(&r);
    if (*r.at == '\0')
        return value;
    refuse(&r, "something follows the value");
    json_free(value);
    return NULL;
}

const struct json *json_member(const struct json *object, const char *name)
{
    for (const struct json *member = object->child; member != NULL; member = member->next)
        if (strcmp(member->name, name) == 0)
            return member;
    return NULL;
}

size_t json_length(const struct json *value)
{
    size_t length = 0;
    for (const struct json *item = value->child; item != NULL; item = item->next)
        length++;
    return length;
}

const char *json_kind_name(enum json_kind kind)
{
    static const char *const names[] = {"an object", "an array", "a string", "a number", "true", "false", "null"};
    return names[kind];
}
